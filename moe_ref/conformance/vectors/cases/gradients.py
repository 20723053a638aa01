"""Gradients (D1 to D5), and fp16 past its range on the way (E7)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_ref.conformance.judgement.ranges import RANGES, case_of
from moe_ref.conformance.problems.pinned import DEEPSEEK, GPT_OSS
from moe_ref.conformance.vectors.cases.case import Case, layer, of
from moe_ref.conformance.vectors.layers import Layer
from moe_ref.types import MoEConfig

TWO = MoEConfig(2)
# Of `RANGES`: sites at which the small layers below do not pass the range.
SITES = (
    "gates",
    "weighted outputs",
    "weighted upstream gradients",
    "gradients of outputs",
    "gradients of slots",
    "scaled gradients of slots",
    "gradients of adapters",
)
BOTH: dict[str, Any] = {"gate_up_bias": True, "down_bias": True}
SIGMOID = MoEConfig(3, scoring="sigmoid", renormalize=True, routed_scaling_factor=2.5)


def _gradients() -> list[Case]:
    says = "The backward pass with and without recomputation gives the same bits."
    ids = "Gradients go to the ids that the forward pass chose: the logits' are 0 elsewhere."
    few = "Experts without a token have gradients of exactly 0."
    deepseek = replace(DEEPSEEK, top_k=3)
    return [
        layer("recompute", "D4", says, replace(GPT_OSS, top_k=2), **BOTH, gate_up_rank=2, seed=1),
        layer("recompute-in-bf16", "D4", says, SIGMOID, dtype="bfloat16", **BOTH, seed=2),
        layer("chosen-ids", "D5 D1", ids, deepseek, "5 7 8 3", seed=3),
        layer("chosen-ids-topk-softmax", "D5 D1", ids, replace(GPT_OSS, top_k=3), "5 7 8 3", seed=4),
        layer("experts-without-tokens", "D2", few, TWO, "2 7 8 3", **BOTH, down_rank=2, seed=5),
        layer("no-tokens-adapted", "D2 E3", few, TWO, "0 3 8 5", **BOTH, gate_up_rank=2, seed=6),
        layer(
            "weights-gradient",
            "D3",
            "The bias counts in the gradient of a weight.",
            TWO,
            entry="experts",
            **BOTH,
            seed=7,
        ),
        layer(
            "frozen",
            "D1",
            "Projections are frozen: others have gradients.",
            TWO,
            **BOTH,
            gate_up_rank=2,
            frozen=frozenset({"gate_up_proj", "down_proj"}),
            seed=8,
        ),
        layer(
            "saturated-sigmoid",
            "D1 R1",
            "Scores near 0 and 1, whose slopes are small.",
            MoEConfig(2, scoring="sigmoid"),
            "5 4 8 3",
            routing_dtype="float64",
            dtype="float64",
            logits="shifted",
            seed=9,
        ),
        layer(
            "all-together",
            "D1",
            "Everything that a layer may have.",
            replace(SIGMOID, alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved"),
            "6 6 8 3",
            **BOTH,
            gate_up_rank=2,
            down_rank=2,
            expert_scale=True,
            post_expert_norm=True,
            seed=10,
        ),
    ]


def _past_range() -> list[Case]:
    """Small relatives of `pinned.PAST_RANGE`."""
    wanted: dict[str, tuple[MoEConfig, dict[str, int], dict[str, Any]]] = {
        "z": (replace(GPT_OSS, top_k=2), {"x[0]": 12, "gate_up_proj": 4}, BOTH),
        "h": (MoEConfig(2, activation="geglu", routed_scaling_factor=2.0**-14), {"up": 13, "x": 3}, {}),
        "o": (MoEConfig(2, routed_scaling_factor=2.0**-16), {"gate_up_proj": 2, "down_proj": 13}, {"down_bias": True}),
        "dh": (MoEConfig(2, activation="gelu"), {"x": -4, "gate_up_proj": -5, "dy": 8, "down_proj": 9}, {}),
        "scaled-input": (
            MoEConfig(2, scoring="sigmoid", scale_input=True, routed_scaling_factor=2.0**12),
            {"x": 5, "gate_up_proj": -14, "dy": -9},
            {},
        ),
        "between-factors": (
            TWO,
            {"gate_up_lora_a": 14, "gate_up_lora_b": -14, "down_lora_a": 14, "down_lora_b": -14, "dy": -3},
            {"gate_up_rank": 2, "down_rank": 2},
        ),
    }
    says = "In fp16 numbers pass the format's range on the way, and no answer does."
    sites = []
    for name in SITES:
        problem, arrays = case_of(RANGES[name])
        problem = replace(problem, frozen=frozenset({"gate_up_proj", "down_proj"}))  # or the file is large
        sites.append(of(f"past-range-{name.replace(' ', '-')}", "E7", says, Layer(problem, arrays)))
    return sites + [
        layer(f"past-range-{name}", "E7", says, config, dtype="float16", powers=tuple(powers.items()), **more, seed=1)
        for name, (config, powers, more) in wanted.items()
    ]


def cases() -> list[Case]:
    """All of them."""
    return [*_gradients(), *_past_range()]
