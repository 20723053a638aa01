"""Layers with projections in 4 bits (Q1 to Q5, M1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_ref.conformance.problems.pinned import GPT_OSS, MUSE
from moe_ref.conformance.vectors.cases import experts, gradients, norms, routing, slots
from moe_ref.conformance.vectors.cases.case import Case, layer
from moe_ref.conformance.vectors.layers import Layer
from moe_ref.types import MoEConfig

TWO = MoEConfig(2)
IN_NF4 = (
    *(
        "broken-x-and-logits",
        "cut-points-empty",
        "expert-scale-ignored",
        "clamp-after",
        "clamp-after-small",
        "softcaps",
    ),
    *("softcap-of-the-gate-alone", "scale-input", "scale-input-two-experts", "scale-input-adapters", "norm-of-zeros"),
    *("past-range-z", "past-range-h", "past-range-o", "past-range-dh", "past-range-scaled-input", "recompute"),
    *("past-range-between-factors", "gpt-oss", "no-tokens", "weights-gradient", "all-experts-softmax"),
)


def _layers() -> list[Case]:
    small = replace(GPT_OSS, top_k=2)
    both: dict[str, Any] = {"gate_up_bias": True, "down_bias": True}
    adapters: dict[str, Any] = {"gate_up_rank": 2, "down_rank": 2}
    wanted: dict[str, tuple[str, str, MoEConfig, str, dict[str, Any]]] = {
        "nf4": ("Q1 Q2", "Frozen projections in NF4.", TWO, "5 3 16 8", {"quant_type": "nf4", **both}),
        "nf4-straddling": (
            "Q1 Q3",
            "Blocks straddle rows and experts.",
            MoEConfig(2, activation="gelu"),
            "5 5 7 5",
            {"quant_type": "nf4", "blocksize": 32, "nested": "one"},
        ),
        "nf4-nested-per-expert": (
            "Q5 Q3",
            "Stored transposed, nested for each expert, with adapters.",
            small,
            "5 3 32 16",
            {
                "quant_type": "nf4",
                "nested": "per expert",
                "weights_layout": "transposed",
                "dtype": "bfloat16",
                **both,
                **adapters,
            },
        ),
        "nf4-large-block": (
            "Q1",
            "All numbers are in one block, which is partial.",
            TWO,
            "4 3 17 1",
            {"quant_type": "fp4", "blocksize": 4096, "weights_layout": "transposed", "dtype": "float16"},
        ),
        "fp4": ("Q1 Q2", "Frozen projections in FP4.", TWO, "5 3 16 8", {"quant_type": "fp4", "dtype": "float16"}),
        "nf4-norm": (
            "Q1 E8",
            "A norm after each expert.",
            replace(MUSE, top_k=2),
            "4 3 16 8",
            {"quant_type": "nf4", "post_expert_norm": True, "down_bias": True},
        ),
        "nf4-no-tokens": ("Q1 E3", "Nobody has a token.", TWO, "0 3 8 8", {"quant_type": "nf4"}),
        "nf4-beside-dense": (
            "Q1 D1",
            "One projection in 4 bits, the other dense, with a gradient.",
            small,
            "4 3 16 8",
            {"quant_type": "nf4", "down_quant_type": "", "dtype": "bfloat16", **both},
        ),
        "fp4-beside-nf4": (
            "Q1 Q5",
            "Two formats.",
            TWO,
            "4 3 16 8",
            {"quant_type": "fp4", "down_quant_type": "nf4", "blocksize": 32, "nested": "one"},
        ),
        "mxfp4": ("M1", "gpt-oss' form.", small, "4 2 32 32", {"quant_type": "mxfp4", "dtype": "bfloat16", **both}),
        "mxfp4-transposed": (
            "M1",
            "Blocks along the output dimension.",
            small,
            "4 2 32 32",
            {"quant_type": "mxfp4", "weights_layout": "transposed", "dtype": "float16"},
        ),
        "mxfp4-beside-dense": (
            "M1 D1",
            "down_proj in 4 bits beside a dense one.",
            MoEConfig(1),
            "4 1 32 32",
            {"down_quant_type": "mxfp4", "down_rank": 2, "seed": 3},
        ),
    }
    return [
        layer(f"layer-{name}", clauses, says, config, sizes, **more)
        for name, (clauses, says, config, sizes, more) in wanted.items()
    ]


def _in_nf4() -> list[Case]:
    """Cases of dense layers once more, for executors that take 4 bits only."""
    found = []
    for case in (*routing.cases(), *slots.cases(), *experts.cases(), *norms.cases(), *gradients.cases()):
        if case.name in IN_NF4:
            assert isinstance(case.content, Layer)
            problem = replace(case.content.problem, quant_type="nf4", blocksize=32)
            found.append(Case(f"nf4-{case.name}", (*case.clauses, "Q1"), f"In NF4: {case.says}", Layer(problem)))
    return found


def cases() -> list[Case]:
    """All of them."""
    return [*_layers(), *_in_nf4()]
