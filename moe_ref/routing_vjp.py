"""The backward pass of routing: the choice of ids has no gradient, the weights of the chosen have (clause D1)."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float, Int
from moe_ref.numerics import EXACT, Rounding
from moe_ref.routing import chosen_scores, put_chosen, sigmoid, softmax, take_chosen, undefined_rows
from moe_ref.types import MoEConfig


def route_vjp(
    router_logits: Float[Array, "*#samples T E"],
    topk_ids: Int[Array, "T K"],
    config: MoEConfig,
    d_topk_weights: Float[Array, "*#samples T K"],
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples T E"]:
    """The gradient of router_logits, through the weights (D1). Rows with undefined weights (R4) get NaN."""
    xp = array_namespace(router_logits, d_topk_weights)
    broken = undefined_rows(router_logits, topk_ids, config)[..., None]
    logits = xp.where(broken, xp.zeros_like(router_logits), router_logits)
    d_scores = d_topk_weights * config.routed_scaling_factor
    if config.renormalize:
        scores = chosen_scores(logits, topk_ids, config, rounding)
        d_scores = renormalize_vjp(scores, config.renormalize_eps, d_scores, rounding)
    if config.scoring == "softmax":
        p = softmax(logits, rounding)
        d_logits = softmax_vjp(p, put_chosen(d_scores, topk_ids, logits.shape[-1]), rounding)
    else:
        chosen = take_chosen(logits, topk_ids)
        if config.scoring == "topk_softmax":
            d_chosen = softmax_vjp(softmax(chosen, rounding), d_scores, rounding)
        else:
            d_chosen = d_scores * sigmoid(chosen) * sigmoid(-chosen)
            magnitude = xp.abs(d_scores) * sigmoid(chosen)  # an implementation may form s (1 - s)
            d_chosen = rounding.accumulate("d_router_logits", d_chosen, lambda: magnitude)
        d_logits = put_chosen(d_chosen, topk_ids, logits.shape[-1])
    return xp.where(broken, xp.full_like(d_logits, math.nan), d_logits)


def softmax_vjp(
    p: Float[Array, "*#samples T N"], dp: Float[Array, "*#samples T N"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples T N"]:
    """Gradient d logits = p (dp - <p, dp>): a difference of nearly equal terms, whose error is that of the terms."""
    xp = array_namespace(p, dp)
    terms = p * dp
    d_logits = terms - p * xp.sum(terms, axis=-1, keepdims=True)
    return rounding.accumulate(
        "d_router_logits",
        d_logits,
        lambda: xp.abs(terms) + p * xp.sum(xp.abs(terms), axis=-1, keepdims=True),
    )


def renormalize_vjp(
    scores: Float[Array, "*#samples T K"], eps: float, dw: Float[Array, "*#samples T K"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples T K"]:
    """Gradient of the scores of w = scores / (sum + eps): (dw - <w, dw>) / (sum + eps)."""
    xp = array_namespace(scores, dw)
    total = xp.sum(scores, axis=-1, keepdims=True) + eps
    terms = scores / total * dw
    d_scores = (dw - xp.sum(terms, axis=-1, keepdims=True)) / total
    return rounding.accumulate(
        "d_scores", d_scores, lambda: (xp.abs(dw) + xp.sum(xp.abs(terms), axis=-1, keepdims=True)) / total
    )
