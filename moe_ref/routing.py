"""From router_logits to the chosen experts and their weights (clauses R1 to R5), and its backward pass.

The choice of experts has no gradient; the weights of the chosen experts have one (clause D1).
"""

from __future__ import annotations

import math

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Bool, Float, Int
from moe_ref.expert_scale import scale_by_expert
from moe_ref.moving import widened
from moe_ref.numerics import EXACT, Rounding, sum_last
from moe_ref.scores import (
    exponent_error,
    put_chosen,
    sigmoid,
    softmax,
    softmax_vjp,
    sqrtsoftplus,
    sqrtsoftplus_slope,
    take_chosen,
)
from moe_ref.types import MoEConfig, Routing
from moe_ref.validation import check_route_inputs


def route(
    router_logits: Float[Array, "*#samples T E"],
    config: MoEConfig,
    selection_bias: Float[Array, " E"] | None = None,
    rounding: Rounding = EXACT,
    *,
    expert_scale: Float[Array, " E"] | None = None,
) -> Routing:
    """Chooses K experts for each token and weighs them.

    Args:
        router_logits: any float dtype, read exactly.
        config: ``top_k`` must be set.
        selection_bias: any float dtype; changes the choice only, never the weight (R3).
        rounding: rounding policy.
        expert_scale: any float dtype; multiplies the weight of each expert last (R9).

    Returns:
        Routing with topk_ids [T, K] int64 and topk_weights [T, K] float64.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_route_inputs(router_logits, config, selection_bias, expert_scale)
    logits = widened(router_logits)
    topk_ids = choose(logits, config, selection_bias)
    return Routing(topk_ids, weigh(logits, topk_ids, config, rounding, expert_scale))


def choose(
    logits: Float[Array, "T E"], config: MoEConfig, selection_bias: Float[Array, " E"] | None = None
) -> Int[Array, "T K"]:
    """Chooses ids by (key descending, id ascending), within the best groups (R2).

    A NaN counts as the smallest key. Its row has NaN weights anyway; the ids are in range and distinct.
    """
    assert config.top_k is not None
    keys = choice_keys(logits, config, selection_bias)
    if config.num_groups > 1:
        keys = keys_of_groups(keys, choose_groups(group_keys(keys, config), config))
    return _largest(keys, config.top_k)


def keys_are_rounded(config: MoEConfig, selection_bias: Array | None) -> bool:
    """Whether keys are computed with rounding, so that implementations may differ in their last bits (R2)."""
    return selection_bias is not None or config.num_groups > 1


def choice_keys(
    logits: Float[Array, "T E"], config: MoEConfig, selection_bias: Float[Array, " E"] | None = None
) -> Float[Array, "T E"]:
    """The keys by which experts are chosen: the logits; with a bias or groups, score + bias or logit + bias.

    Every scoring orders experts as the logits do. A logit of -inf or NaN has key -inf, whatever its bias; so does a
    bias of -inf or NaN, whatever the logit (R4).
    """
    xp = array_namespace(logits)
    keys = unbiased_keys(logits, config) if keys_are_rounded(config, selection_bias) else logits
    possible = (logits > -math.inf) & ~xp.isnan(keys)
    lowest = xp.full_like(logits, -math.inf)
    if selection_bias is None:
        return xp.where(possible, keys, lowest)
    bias = xp.astype(selection_bias, xp.float64)
    possible = possible & (bias > -math.inf)
    return xp.where(possible, keys, lowest) + xp.where(possible, bias, xp.zeros_like(bias))


def unbiased_keys(logits: Float[Array, "T E"], config: MoEConfig) -> Float[Array, "T E"]:
    """What a selection bias is added to, by ``selection_key``: the score, or the logit (R2, R3).

    The score of "topk_softmax" is the logit.
    """
    if config.selection_key == "logit" or config.scoring == "topk_softmax":
        return logits
    if config.scoring == "softmax":
        xp = array_namespace(logits)
        return softmax(xp.where(broken_rows(logits, config)[..., None], xp.zeros_like(logits), logits))
    return sigmoid(logits) if config.scoring == "sigmoid" else sqrtsoftplus(logits)


def group_keys(keys: Float[Array, "T E"], config: MoEConfig) -> Float[Array, "T G"]:
    """The key of each group of E / G neighbouring experts, by ``group_score``."""
    xp = array_namespace(keys)
    members = xp.reshape(keys, (*keys.shape[:-1], config.num_groups, keys.shape[-1] // config.num_groups))
    if config.group_score == "max":
        return xp.max(members, axis=-1)
    best = xp.sort(members, axis=-1)
    first, second = best[..., -1], best[..., -2]
    possible = second > -math.inf  # inf - inf would be undefined
    return xp.where(possible, first + xp.where(possible, second, xp.zeros_like(second)), second)


def choose_groups(keys: Float[Array, "T G"], config: MoEConfig) -> Bool[Array, "T G"]:
    """Which groups are kept: those with the ``topk_groups`` largest keys; of equal keys, the lower group."""
    xp = array_namespace(keys)
    groups = xp.arange(config.num_groups, device=device(keys))
    chosen = _largest(keys, config.topk_groups)
    return xp.any(chosen[..., None] == groups, axis=-2)


def keys_of_groups(keys: Float[Array, "T E"], kept: Bool[Array, "T G"]) -> Float[Array, "T E"]:
    """The keys, with -inf for experts outside the kept groups."""
    xp = array_namespace(keys)
    members = xp.repeat(kept, keys.shape[-1] // kept.shape[-1], axis=-1)
    return xp.where(members, keys, xp.full_like(keys, -math.inf))


def _largest(keys: Array, count: int) -> Array:
    return array_namespace(keys).argsort(-keys, axis=-1, stable=True)[..., :count]


def broken_rows(logits: Float[Array, "*#samples T E"], config: MoEConfig) -> Bool[Array, "*#samples T"]:
    """Rows with undefined weights (R4).

    These are rows with a NaN; with a +inf, whose score is finite under "sigmoid" alone; and, under either softmax, of
    nothing but -inf.
    """
    xp = array_namespace(logits)
    broken = xp.any(xp.isnan(logits), axis=-1)
    if config.scoring == "sigmoid":
        return broken
    broken = broken | xp.any(logits == math.inf, axis=-1)
    return broken if config.scoring == "sqrtsoftplus" else broken | xp.all(logits == -math.inf, axis=-1)


def undefined_rows(
    logits: Float[Array, "*#samples T E"], topk_ids: Int[Array, "T K"], config: MoEConfig
) -> Bool[Array, "*#samples T"]:
    """Broken rows and, under "topk_softmax", rows whose chosen logits are all -inf, which only groups cause (R4)."""
    xp = array_namespace(logits)
    broken = broken_rows(logits, config)
    if config.scoring != "topk_softmax":
        return broken
    return broken | xp.all(take_chosen(xp.where(logits == -math.inf, 0.0, 1.0), topk_ids) == 0.0, axis=-1)


def weigh(
    logits: Float[Array, "*#samples T E"],
    topk_ids: Int[Array, "T K"],
    config: MoEConfig,
    rounding: Rounding = EXACT,
    expert_scale: Float[Array, " E"] | None = None,
) -> Float[Array, "*#samples T K"]:
    """The weights of the chosen experts: score, renormalisation, scaling factor, scales. NaN for undefined rows."""
    xp = array_namespace(logits)
    broken = undefined_rows(logits, topk_ids, config)[..., None]
    weights = chosen_scores(xp.where(broken, xp.zeros_like(logits), logits), topk_ids, config, rounding)
    if config.renormalize:
        weights = weights / divisor(sum_last(rounding, "renormalize", weights)[..., None], config)
    weights = weights * config.routed_scaling_factor
    weights = rounding.accumulate("topk_weights", weights, lambda: xp.abs(weights))
    weights = xp.where(broken, xp.full_like(weights, math.nan), weights)
    return scale_by_expert(weights, topk_ids, expert_scale, rounding)


def divisor(total: Float[Array, "*#samples T 1"], config: MoEConfig) -> Float[Array, "*#samples T 1"]:
    """What renormalisation divides by: the sum + eps, or the larger of the two; 1 where that is 0 (R5)."""
    xp = array_namespace(total)
    if config.renormalize_form == "add":
        total = total + config.renormalize_eps
    else:
        total = xp.where(total < config.renormalize_eps, xp.full_like(total, config.renormalize_eps), total)
    return xp.where(total == 0.0, xp.ones_like(total), total)


def chosen_scores(
    logits: Float[Array, "*#samples T E"], topk_ids: Int[Array, "T K"], config: MoEConfig, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T K"]:
    """Scores of the chosen experts, before renormalisation."""
    if config.scoring == "softmax":
        return take_chosen(softmax(logits, rounding), topk_ids)
    chosen = take_chosen(logits, topk_ids)
    if config.scoring == "topk_softmax":
        return softmax(chosen, rounding)
    if config.scoring == "sigmoid":
        return sigmoid(chosen)
    scores = sqrtsoftplus(chosen)
    return rounding.accumulate("scores", scores, lambda: scores * exponent_error(chosen))


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
        d_scores = renormalize_vjp(scores, config, d_scores, rounding)
    if config.scoring == "softmax":
        p = softmax(logits, rounding)
        d_logits = softmax_vjp(p, put_chosen(d_scores, topk_ids, logits.shape[-1]), rounding)
    else:
        chosen = take_chosen(logits, topk_ids)
        if config.scoring == "topk_softmax":
            d_chosen = softmax_vjp(softmax(chosen, rounding), d_scores, rounding)
        elif config.scoring == "sqrtsoftplus":
            d_chosen = d_scores * sqrtsoftplus_slope(chosen)
            size = xp.abs(d_chosen)
            d_chosen = rounding.accumulate("d_router_logits", d_chosen, lambda: size * exponent_error(chosen))
        else:
            d_chosen = d_scores * sigmoid(chosen) * sigmoid(-chosen)
            magnitude = xp.abs(d_scores) * sigmoid(chosen)  # an implementation may compute s (1 - s)
            d_chosen = rounding.accumulate("d_router_logits", d_chosen, lambda: magnitude)
        d_logits = put_chosen(d_chosen, topk_ids, logits.shape[-1])
    return xp.where(broken, xp.full_like(d_logits, math.nan), d_logits)


def renormalize_vjp(
    scores: Float[Array, "*#samples T K"],
    config: MoEConfig,
    dw: Float[Array, "*#samples T K"],
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples T K"]:
    """Gradient of the scores of w = scores / divisor: (dw - <w, dw>) / divisor, or dw / eps where the sum is below eps.

    With ``renormalize_form`` "max", a sum that equals eps counts as above it (R5).
    """
    xp = array_namespace(scores, dw)
    total = xp.sum(scores, axis=-1, keepdims=True)
    below = (total < config.renormalize_eps) & (config.renormalize_form == "max")
    total = divisor(total, config)
    terms = xp.where(below, xp.zeros_like(dw), scores / total * dw)
    d_scores = (dw - xp.sum(terms, axis=-1, keepdims=True)) / total
    return rounding.accumulate(
        "d_scores", d_scores, lambda: (xp.abs(dw) + xp.sum(xp.abs(terms), axis=-1, keepdims=True)) / total
    )
