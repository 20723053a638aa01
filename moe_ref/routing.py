"""From router_logits to the chosen experts and their weights (clauses R1, R2, R4, R5)."""

from __future__ import annotations

import math

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Bool, Float, Int
from moe_ref.numerics import EXACT, Rounding, sum_last
from moe_ref.types import MoEConfig, Routing
from moe_ref.validation import check_route_inputs


def route(router_logits: Float[Array, "*#samples T E"], config: MoEConfig, rounding: Rounding = EXACT) -> Routing:
    """Chooses K experts for each token and weighs them.

    Args:
        router_logits: any float dtype, read exactly.
        config: ``top_k`` must be set.
        rounding: rounding policy.

    Returns:
        Routing with topk_ids [T, K] int64 and topk_weights [T, K] float64.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_route_inputs(router_logits, config)
    xp = array_namespace(router_logits)
    logits = xp.astype(router_logits, xp.float64)
    topk_ids = choose(logits, config)
    return Routing(topk_ids, weigh(logits, topk_ids, config, rounding))


def choose(logits: Float[Array, "T E"], config: MoEConfig) -> Int[Array, "T K"]:
    """Ids by (key descending, id ascending); the key is the logit, which orders as every scoring does (R2).

    A NaN counts as the smallest key: such a row has NaN weights anyway, and its ids are in range and distinct.
    """
    xp = array_namespace(logits)
    assert config.top_k is not None
    keys = xp.where(xp.isnan(logits), xp.full_like(logits, -math.inf), logits)
    return xp.argsort(-keys, axis=-1, stable=True)[..., : config.top_k]


def broken_rows(logits: Float[Array, "*#samples T E"], config: MoEConfig) -> Bool[Array, "*#samples T"]:
    """Rows whose weights are undefined: any NaN; for the softmax kinds also any +inf, or nothing but -inf (R4)."""
    xp = array_namespace(logits)
    broken = xp.any(xp.isnan(logits), axis=-1)
    if config.scoring == "sigmoid":
        return broken
    return broken | xp.any(logits == math.inf, axis=-1) | xp.all(logits == -math.inf, axis=-1)


def weigh(
    logits: Float[Array, "*#samples T E"], topk_ids: Int[Array, "T K"], config: MoEConfig, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T K"]:
    """The weights of the chosen experts: score, renormalisation, scaling factor. NaN for broken rows."""
    xp = array_namespace(logits)
    broken = broken_rows(logits, config)[..., None]
    weights = chosen_scores(xp.where(broken, xp.zeros_like(logits), logits), topk_ids, config, rounding)
    if config.renormalize:
        weights = weights / (sum_last(rounding, "renormalize", weights)[..., None] + config.renormalize_eps)
    weights = weights * config.routed_scaling_factor
    weights = rounding.accumulate("topk_weights", weights, lambda: xp.abs(weights))
    return xp.where(broken, xp.full_like(weights, math.nan), weights)


def chosen_scores(
    logits: Float[Array, "*#samples T E"], topk_ids: Int[Array, "T K"], config: MoEConfig, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T K"]:
    """Scores of the chosen experts, before renormalisation."""
    if config.scoring == "softmax":
        return take_chosen(softmax(logits, rounding), topk_ids)
    chosen = take_chosen(logits, topk_ids)
    return softmax(chosen, rounding) if config.scoring == "topk_softmax" else sigmoid(chosen)


def softmax(logits: Float[Array, "*#samples T N"], rounding: Rounding = EXACT) -> Float[Array, "*#samples T N"]:
    """exp(l - max l) / sum exp(l - max l), over the last axis."""
    xp = array_namespace(logits)
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    shifted = rounding.accumulate(
        "shifted_logits", shifted, lambda: xp.where(xp.isfinite(shifted), xp.abs(shifted), xp.zeros_like(shifted))
    )
    exponentials = xp.exp(shifted)
    total = xp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / rounding.accumulate("softmax_sum", total, lambda: total)


def sigmoid(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / (1 + exp(-v)), without overflow on either side."""
    xp = array_namespace(value)
    positive = value >= 0
    small = xp.exp(xp.where(positive, -value, value))  # not -|v|: autograd takes the derivative of |v| at 0 for 0
    return xp.where(positive, xp.ones_like(small), small) / (1 + small)


def take_chosen(values: Float[Array, "*#samples T E"], topk_ids: Int[Array, "T K"]) -> Float[Array, "*#samples T K"]:
    """values[..., t, topk_ids[t, k]]."""
    xp = array_namespace(values)
    experts = xp.arange(values.shape[-1], device=device(values))
    zero = xp.zeros_like(values)
    columns = [
        xp.sum(xp.where(experts == topk_ids[..., k, None], values, zero), axis=-1) for k in range(topk_ids.shape[-1])
    ]
    return xp.stack(columns, axis=-1)


def put_chosen(
    values: Float[Array, "*#samples T K"], topk_ids: Int[Array, "T K"], num_experts: int
) -> Float[Array, "*#samples T E"]:
    """The transpose of `take_chosen`: zero but at [t, topk_ids[t, k]]."""
    xp = array_namespace(values)
    experts = xp.arange(num_experts, device=device(values))
    total = xp.zeros((*values.shape[:-1], num_experts), dtype=values.dtype, device=device(values))
    for k in range(topk_ids.shape[-1]):
        column = values[..., k, None]
        total = total + xp.where(experts == topk_ids[..., k, None], column, xp.zeros_like(column))
    return total
