"""A norm after each expert (E8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_ref.conformance.problems.pinned import MUSE
from moe_ref.conformance.vectors.cases.case import Case, layer
from moe_ref.types import MoEConfig

NORM: dict[str, Any] = {"post_expert_norm": True}
TWO = replace(MUSE, top_k=2)
ZEROS = MoEConfig(2, activation="relu2", post_expert_norm_eps=1e-6)
ONE = MoEConfig(2, post_expert_norm_eps=1.0)


def cases() -> list[Case]:
    """All of them."""
    return [
        layer("norm", "E8", "Each expert's output is normalised, with a learned factor before the mean.", TWO, **NORM),
        layer(
            "norm-bias-adapters",
            "E8 E6",
            "o has its bias and adapter.",
            TWO,
            **NORM,
            down_bias=True,
            down_rank=2,
            seed=1,
        ),
        layer("norm-in-bf16", "E8 T1", "The factor has a dtype of its own.", TWO, **NORM, dtype="bfloat16", seed=2),
        layer("norm-of-zeros", "E8", "Outputs of 0: only the epsilon divides.", ZEROS, "6 3 7 1", **NORM, seed=15),
        layer("norm-of-one-feature", "E8 E3", "The mean is over a single feature.", ONE, "5 3 1 5", **NORM, seed=3),
        layer(
            "norm-empty-slots", "E8 R7", "Empty slots add 0.", TWO, **NORM, entry="experts", empty_slots=True, seed=4
        ),
        layer(
            "norm-broken",
            "E8 R4",
            "A broken token spoils the factor's gradient alone.",
            TWO,
            **NORM,
            broken_x=1,
            seed=5,
        ),
    ]
