"""Dtypes beside each other (T1, T2)."""

from __future__ import annotations

from moe_ref.conformance.vectors.cases.case import Case, layer
from moe_ref.types import MoEConfig


def cases() -> list[Case]:
    """All of them."""
    return [
        layer(
            f"dtypes-{dtype}",
            "T1 T2",
            f"{dtype}, logits {routing}, biases {bias}, adapters {lora}: each gradient has its owner's dtype.",
            MoEConfig(2),
            dtype=dtype,
            routing_dtype=routing,
            bias_dtype=bias,
            lora_dtype=lora,
            gate_up_bias=True,
            down_bias=True,
            expert_scale=True,
            gate_up_rank=2,
            seed=number,
        )
        for number, (dtype, routing, bias, lora) in enumerate(
            [
                ("float64", "float32", "bfloat16", "float16"),
                ("float32", "bfloat16", "float16", "float64"),
                ("bfloat16", "float32", "float32", "float32"),
                ("float16", "float64", "bfloat16", "float32"),
            ]
        )
    ]
