"""From slots back to tokens (clause C1)."""

from __future__ import annotations

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float
from moe_ref.numerics import EXACT, Rounding, sum_last


def combine(
    outputs: Float[Array, "*#samples S H"], topk_weights: Float[Array, "*#samples T K"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """y[t] = sum over k, in increasing order, of topk_weights[t, k] * outputs[t*K + k]."""
    xp = array_namespace(outputs, topk_weights)
    tokens, top_k = topk_weights.shape[-2:]
    slots = xp.reshape(outputs, (*outputs.shape[:-2], tokens, top_k, outputs.shape[-1]))
    weighted = rounding.store("weighted_o", topk_weights[..., None] * slots)
    return sum_last(rounding, "y", xp.moveaxis(weighted, -2, -1))
