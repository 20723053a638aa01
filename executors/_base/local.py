"""Refuses DTensors in one line that says what to call: an executor computes on the tensors of its own process."""

from __future__ import annotations

from typing import Any

from moe_ref.types import LEARNED, LORA_FACTORS, MoEWeights, PackedTensor

OWN = (*(name for name in LEARNED if name not in LORA_FACTORS), "selection_bias")
OF_TOKENS = ("x", "router_logits", "topk_ids", "topk_weights")  # have a row for each token


def check_local(weights: MoEWeights, **arrays: Any) -> None:
    """Checks that neither a parameter nor another argument is a DTensor.

    Args:
        weights: the layer's parameters.
        **arrays: the other arguments, by name.

    Raises:
        TypeError: one line naming the argument, its placements, and what to call.
    """
    for name in OWN:
        value = getattr(weights, name)
        _check(name, value.codes if isinstance(value, PackedTensor) else value)
    if weights.lora is not None:
        for name in LORA_FACTORS:
            _check(name, getattr(weights.lora, name))
    for name, value in arrays.items():
        _check(name, value)


def _check(name: str, value: Any) -> None:
    if not hasattr(value, "placements"):  # asked of any tensor: torch.distributed is not imported for it
        return
    placements = tuple(value.placements)
    if all(own.is_replicate() for own in placements):
        remedy = f"call {name}.to_local()"
    elif name in OF_TOKENS:
        remedy = f"call {name}.to_local() for this rank's tokens, or {name}.full_tensor()"
    elif name == "post_expert_norm":
        remedy = f"call {name}.full_tensor()"
    else:
        remedy = (
            f"call {name}.full_tensor(), or .experts() with the .to_local() of all parameters, topk_ids minus "
            "the rank's first expert, and the sum of all ranks' y"
        )
    raise TypeError(f"{name} is a DTensor placed as {placements}: must be a plain tensor; {remedy}")
