"""Learned scales of the experts' weights (clause R9), and their gradient (D1)."""

from __future__ import annotations

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float, Int
from moe_ref.numerics import EXACT, Rounding, sum_sd
from moe_ref.scores import put_chosen, take_chosen


def scale_by_expert(
    topk_weights: Float[Array, "*#samples T K"],
    topk_ids: Int[Array, "T K"],
    expert_scale: Float[Array, " E"] | None,
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples T K"]:
    """The weights times the learned scales of their experts (R9); the weights themselves without such scales."""
    if expert_scale is None:
        return topk_weights
    xp = array_namespace(topk_weights)
    scaled = topk_weights * scales_of(topk_ids, expert_scale)
    return rounding.accumulate("topk_weights_scaled", scaled, lambda: xp.abs(scaled))


def scales_of(topk_ids: Int[Array, "T K"], expert_scale: Float[Array, " E"]) -> Float[Array, "T K"]:
    """The scale of each chosen expert, in float64."""
    xp = array_namespace(topk_ids)
    wide = xp.astype(expert_scale, xp.float64)
    return take_chosen(xp.broadcast_to(wide, (topk_ids.shape[0], wide.shape[0])), topk_ids)


def scale_by_expert_vjp(
    topk_weights: Float[Array, "*#samples T K"],
    topk_ids: Int[Array, "T K"],
    expert_scale: Float[Array, " E"],
    d_scaled: Float[Array, "*#samples T K"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*#samples T K"], Float[Array, "*#samples E"]]:
    """The gradients of the weights before they are scaled, and of the scales: exactly 0 for experts unchosen (D2)."""
    xp = array_namespace(topk_weights)
    d_weights = d_scaled * scales_of(topk_ids, expert_scale)
    d_weights = rounding.accumulate("d_topk_weights", d_weights, lambda: xp.abs(d_weights))
    terms = put_chosen(d_scaled * topk_weights, topk_ids, expert_scale.shape[0])
    total, length = xp.sum(terms, axis=-2), terms.shape[-2]
    squares = xp.sum(terms * terms, axis=-2)
    return d_weights, rounding.accumulate("d_expert_scale", total, lambda: sum_sd(total, squares, length))
