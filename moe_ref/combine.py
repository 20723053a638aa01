"""From slots back to tokens (clause C1)."""

from __future__ import annotations

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float
from moe_ref.numerics import EXACT, Rounding, sum_last, sum_sd


def combine(
    outputs: Float[Array, "*#samples S H"], topk_weights: Float[Array, "*#samples T K"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """y[t] = sum over k, in increasing order, of topk_weights[t, k] * outputs[t*K + k]."""
    xp = array_namespace(outputs, topk_weights)
    weighted = xp.reshape(topk_weights, (*topk_weights.shape[:-2], -1, 1)) * outputs
    return sum_slots("y", rounding.store("weighted_o", weighted), topk_weights.shape[-1], rounding)


def sum_slots(
    site: str, slots: Float[Array, "*#samples S H"], top_k: int, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """The sum over each token's K slots, in increasing k."""
    xp = array_namespace(slots)
    apart = xp.reshape(slots, (*slots.shape[:-2], slots.shape[-2] // top_k, top_k, slots.shape[-1]))
    return sum_last(rounding, site, xp.moveaxis(apart, -2, -1))


def combine_vjp(
    topk_weights: Float[Array, "*#samples T K"], dy: Float[Array, "*#samples T H"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples S H"]:
    """The gradient w dy of the experts' outputs. The weights' gradient is `dot` of outputs and unweighted dy (D3)."""
    xp = array_namespace(topk_weights, dy)
    upstream = xp.repeat(dy, topk_weights.shape[-1], axis=-2)
    slot_weights = xp.reshape(topk_weights, (*topk_weights.shape[:-2], -1, 1))
    return rounding.store("weighted_dy", slot_weights * upstream)


def dot(
    left: Float[Array, "*#samples S H"], right: Float[Array, "*#samples S H"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples S 1"]:
    """The dot product of each pair of rows: the gradient of each slot's weight (D3)."""
    xp = array_namespace(left, right)
    terms = left * right
    total = xp.sum(terms, axis=-1, keepdims=True)
    squares = xp.sum(terms * terms, axis=-1, keepdims=True)
    return rounding.accumulate("d_topk_weights", total, lambda: sum_sd(total, squares, terms.shape[-1]))
