"""What every implementation refuses where experts are chosen or arguments do not fit (T1, R8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.cases.case import Case, of
from moe_ref.conformance.vectors.layers import Refused
from moe_ref.types import MoEConfig

GOOD = Problem(2, 6, 4, 3, MoEConfig(2), selection_bias="small", expert_scale=True)
OF_ROUTING: dict[str, tuple[str, dict[str, Any]]] = {
    "top-k-zero": ("top_k", {"top_k": 0}),
    "top-k-past-experts": ("top_k", {"top_k": 7}),
    "groups-that-do-not-divide": ("num_groups", {"num_groups": 4}),
    "top-k-past-groups": ("top_k", {"top_k": 4, "num_groups": 3}),
    "top2-sum-of-one-expert": ("group_score", {"num_groups": 6, "topk_groups": 3, "group_score": "top2_sum"}),
    "more-groups-kept-than-there-are": ("topk_groups", {"num_groups": 2, "topk_groups": 3}),
}


def cases() -> list[Case]:
    """All of them."""
    says = "Must be refused: {}."
    found = [
        of(
            f"refused-{name}",
            "R8",
            says.format(", ".join(f"{key} is {value}" for key, value in changes.items())),
            Refused(GOOD, argument, config=replace(GOOD.config, **changes)),
        )
        for name, (argument, changes) in OF_ROUTING.items()
    ]
    for name in ("selection_bias", "expert_scale"):
        refused = Refused(GOOD, f"{name}.shape", cut=((name, 0),))
        found.append(of(f"refused-{name.replace('_', '-')}", "R8", says.format(f"{name} of five experts"), refused))
    for name in ("x", "down_proj"):
        refused = Refused(GOOD, f"{name}.dtype", dtypes=((name, "bfloat16"),))
        found.append(
            of(f"refused-{name.replace('_', '-')}-dtype", "T1", says.format(f"{name} in another dtype"), refused)
        )
    return found
