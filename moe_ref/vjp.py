"""The backward pass, written out: one function per forward function (clauses D1, D2, D3).

Each ``f_vjp`` takes the inputs of ``f`` and the gradient of its output, and returns the gradients of its inputs.
"""

from __future__ import annotations

import math
from dataclasses import replace

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Float, Int
from moe_ref.combine import combine
from moe_ref.experts import activation, expert, experts, groups, join_gate_up, split_gate_up, up
from moe_ref.grouping import group, is_slot, permute, unpermute
from moe_ref.numerics import EXACT, Rounding, matmul_transposed, sum_last, sum_sd
from moe_ref.routing import broken_rows, chosen_scores, put_chosen, route, sigmoid, softmax, take_chosen, weigh
from moe_ref.types import MoEConfig, MoEGradients, MoEWeights
from moe_ref.validation import check_dy, check_experts_inputs, check_inputs


def moe_vjp(
    x: Float[Array, "*batch H"],
    router_logits: Float[Array, "*batch E"],
    weights: MoEWeights,
    dy: Float[Array, "*batch H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*batch H"], MoEGradients]:
    """`moe` and the gradients of <dy, moe(...)>, in float64.

    Args:
        x: as for `moe_ref.moe`.
        router_logits: as for `moe_ref.moe`.
        weights: as for `moe_ref.moe`.
        dy: the upstream gradient, of x's shape, any float dtype.
        rounding: rounding policy; exact by default.

    Returns:
        (y, gradients), each gradient in the shape of its argument.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_inputs(x, router_logits, weights)
    check_dy(x, dy)
    xp = array_namespace(x)
    hidden, num_experts = weights.hidden_size, weights.num_experts
    rows, logits, upstream = (
        xp.astype(xp.reshape(a, (-1, n)), xp.float64)
        for a, n in ((x, hidden), (router_logits, num_experts), (dy, hidden))
    )
    topk_ids = route(logits, weights.config).topk_ids
    y, gradients = layer_vjp(rows, logits, topk_ids, None, weights, upstream, rounding)
    return _with_shapes(y, gradients, x.shape, router_logits.shape)


def routed_experts_vjp(
    x: Float[Array, "*batch H"],
    topk_ids: Int[Array, "*batch K"],
    topk_weights: Float[Array, "*batch K"],
    weights: MoEWeights,
    dy: Float[Array, "*batch H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*batch H"], MoEGradients]:
    """`routed_experts` and the gradients of <dy, routed_experts(...)>, in float64.

    Args:
        x: as for `moe_ref.routed_experts`.
        topk_ids: as for `moe_ref.routed_experts`.
        topk_weights: as for `moe_ref.routed_experts`.
        weights: as for `moe_ref.routed_experts`.
        dy: the upstream gradient, of x's shape, any float dtype.
        rounding: rounding policy; exact by default.

    Returns:
        (y, gradients), each gradient in the shape of its argument; that of router_logits is None.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_experts_inputs(x, topk_ids, topk_weights, weights)
    check_dy(x, dy)
    xp = array_namespace(x)
    hidden, top_k = weights.hidden_size, topk_ids.shape[-1]
    rows, slot_weights, upstream = (
        xp.astype(xp.reshape(a, (-1, n)), xp.float64) for a, n in ((x, hidden), (topk_weights, top_k), (dy, hidden))
    )
    ids = xp.reshape(topk_ids, (-1, top_k))
    y, gradients = layer_vjp(rows, None, ids, slot_weights, weights, upstream, rounding)
    return _with_shapes(y, gradients, x.shape, None)


def _with_shapes(
    y: Array, gradients: MoEGradients, shape: tuple[int, ...], logits_shape: tuple[int, ...] | None
) -> tuple[Array, MoEGradients]:
    xp = array_namespace(y)
    d_logits = gradients.router_logits
    shaped = replace(
        gradients,
        x=xp.reshape(gradients.x, tuple(shape)),
        router_logits=None if d_logits is None or logits_shape is None else xp.reshape(d_logits, tuple(logits_shape)),
        topk_weights=xp.reshape(gradients.topk_weights, (*shape[:-1], gradients.topk_weights.shape[-1])),
    )
    return xp.reshape(y, tuple(shape)), shaped


def layer_vjp(
    x: Float[Array, "*#samples T H"],
    router_logits: Float[Array, "*#samples T E"] | None,
    topk_ids: Int[Array, "T K"],
    topk_weights: Float[Array, "*#samples T K"] | None,
    weights: MoEWeights,
    dy: Float[Array, "*#samples T H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*#samples T H"], MoEGradients]:
    """Forward and backward with the choice of experts given: it has no gradient (D1), and no sample chooses again.

    Exactly one of ``router_logits`` and ``topk_weights`` is given. A leading axis of samples is carried through.
    """
    xp = array_namespace(x)
    if topk_weights is None:
        topk_weights = weigh(router_logits, topk_ids, weights.config, rounding)
    mask = is_slot(topk_ids, weights.num_experts)
    slot_weights = xp.where(mask, topk_weights, xp.zeros_like(topk_weights))

    grouping = group(topk_ids, weights.num_experts)
    rows = permute(x, grouping.order, topk_ids.shape[-1])
    outputs = unpermute(experts(rows, grouping.group_offsets, weights, rounding), grouping.inverse)
    y = combine(outputs, slot_weights, rounding)

    d_outputs, d_weights = combine_vjp(outputs, slot_weights, dy, rounding)
    d_weights = xp.where(mask, d_weights, xp.zeros_like(d_weights))
    d_rows, d_experts = experts_vjp(
        rows, grouping.group_offsets, weights, unpermute(d_outputs, grouping.order), rounding
    )
    d_logits = None
    if router_logits is not None:
        d_logits = route_vjp(router_logits, topk_ids, weights.config, d_weights, rounding)
    dx = permute_vjp(d_rows, grouping.inverse, topk_ids.shape[-1], rounding)
    return y, MoEGradients(dx, d_logits, d_weights, *d_experts)


def combine_vjp(
    outputs: Float[Array, "*#samples S H"],
    topk_weights: Float[Array, "*#samples T K"],
    dy: Float[Array, "*#samples T H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*#samples S H"], Float[Array, "*#samples T K"]]:
    """Gradients: d outputs = w dy, and d topk_weights[t, k] = <dy[t], o[t, k]> with dy unweighted (D3)."""
    xp = array_namespace(outputs, topk_weights, dy)
    tokens, top_k = topk_weights.shape[-2:]
    hidden = dy.shape[-1]
    slots = xp.reshape(outputs, (*outputs.shape[:-2], tokens, top_k, hidden))
    d_slots = rounding.store("weighted_dy", topk_weights[..., None] * dy[..., None, :])
    terms = slots * dy[..., None, :]
    totals = xp.sum(terms, axis=-1)
    d_weights = rounding.accumulate(
        "d_topk_weights", totals, lambda: sum_sd(totals, xp.sum(terms * terms, axis=-1), hidden)
    )
    return xp.reshape(d_slots, (*d_slots.shape[:-3], tokens * top_k, hidden)), d_weights


def permute_vjp(
    d_rows: Float[Array, "*#samples S H"], inverse: Int[Array, " S"], top_k: int, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """dx[t] is the sum, in increasing k, over the token's slots."""
    xp = array_namespace(d_rows)
    slots = unpermute(d_rows, inverse)
    slots = xp.reshape(slots, (*slots.shape[:-2], slots.shape[-2] // top_k, top_k, slots.shape[-1]))
    return sum_last(rounding, "dx", xp.moveaxis(slots, -2, -1))


def experts_vjp(
    rows: Float[Array, "*#samples S H"],
    group_offsets: Int[Array, " E+1"],
    weights: MoEWeights,
    d_outputs: Float[Array, "*#samples S H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*#samples S H"], tuple[Array, Array, Array | None, Array | None]]:
    """Gradients of rows and of (gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias).

    An expert without rows has gradients of exactly zero (D2).
    """
    xp = array_namespace(rows, d_outputs)
    d_rows, d_parameters = [], {}
    for index, where in groups(group_offsets):
        d_block, *d_parameters[index] = expert_vjp(
            rows[..., where, :], weights, index, d_outputs[..., where, :], rounding
        )
        d_rows.append(d_block)
    samples = d_rows[0].shape[:-2] if d_rows else rows.shape[:-2]
    outside = rows.shape[-2] - int(group_offsets[-1])
    d_rows.append(xp.zeros((*samples, outside, rows.shape[-1]), dtype=xp.float64, device=device(rows)))

    def stack(position: int, parameter: Array | None) -> Array | None:
        if parameter is None:
            return None
        shape = (*samples, *parameter.shape[1:])
        zero = xp.zeros(shape, dtype=xp.float64, device=device(rows))
        parts = [
            xp.broadcast_to(d_parameters[e][position], shape) if e in d_parameters else zero
            for e in range(weights.num_experts)
        ]
        return xp.stack(parts, axis=len(samples))

    parameters = (weights.gate_up_proj, weights.down_proj, weights.gate_up_proj_bias, weights.down_proj_bias)
    stacks = tuple(stack(i, p) for i, p in enumerate(parameters))
    return xp.concat(d_rows, axis=-2), stacks  # type: ignore[return-value]


def expert_vjp(
    rows: Float[Array, "*#samples n H"],
    weights: MoEWeights,
    index: int,
    d_outputs: Float[Array, "*#samples n H"],
    rounding: Rounding = EXACT,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of one expert: rows, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias."""
    parameters = expert(weights, index)
    z = up(rows, parameters, rounding)
    h = activation(z, weights.config, rounding)
    dh, d_down_proj, d_down_proj_bias = linear_vjp("dh", h, parameters.down_proj, d_outputs, rounding)
    dz = activation_vjp(z, weights.config, dh, rounding)
    d_rows, d_gate_up_proj, d_gate_up_proj_bias = linear_vjp("dx_slot", rows, parameters.gate_up_proj, dz, rounding)
    return d_rows, d_gate_up_proj, d_down_proj, d_gate_up_proj_bias, d_down_proj_bias


def linear_vjp(
    site: str,
    rows: Float[Array, "*#samples n k"],
    matrix: Float[Array, "m k"],
    d_product: Float[Array, "*#samples n m"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*#samples n k"], Float[Array, "*#samples m k"], Float[Array, "*#samples m"]]:
    """Gradients of rows, matrix and bias in rows matrix^T + bias."""
    xp = array_namespace(rows, matrix, d_product)
    transposed = xp.matrix_transpose(d_product)
    d_rows = rounding.store(site, matmul_transposed(rounding, site, d_product, xp.matrix_transpose(matrix)))
    d_matrix = matmul_transposed(rounding, "d_weight", transposed, xp.matrix_transpose(rows))
    length = d_product.shape[-2]
    total = xp.sum(d_product, axis=-2)
    d_bias = rounding.accumulate("d_bias", total, lambda: sum_sd(total, xp.sum(d_product * d_product, axis=-2), length))
    return d_rows, d_matrix, d_bias


def activation_vjp(
    z: Float[Array, "*#samples n 2*I"],
    config: MoEConfig,
    dh: Float[Array, "*#samples n I"],
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples n 2*I"]:
    """The gradient dz of the gated activation; the clamp's derivative at equality is 1 (E1)."""
    xp = array_namespace(z, dh)
    gate, up = split_gate_up(z, config)
    limit = math.inf if config.limit is None else config.limit
    clamped_gate, clamped_up = xp.clip(gate, max=limit), xp.clip(up, min=-limit, max=limit)
    s = sigmoid(config.alpha * clamped_gate)
    act = rounding.store("act", clamped_gate * s)
    slope = s * (1 + config.alpha * clamped_gate * (1 - s))
    zero = xp.zeros_like(dh * gate)
    d_gate = xp.where(gate <= limit, dh * (clamped_up + config.up_offset) * slope, zero)
    d_up = xp.where(xp.abs(up) <= limit, dh * act, zero)
    dz = join_gate_up(d_gate, d_up, config)

    def sd() -> Array:  # that of 1 - s is u, however small 1 - s
        magnitude = xp.abs(dh * (clamped_up + config.up_offset)) * s * (1 + xp.abs(config.alpha * clamped_gate))
        return join_gate_up(xp.where(gate <= limit, magnitude, zero), xp.abs(d_up), config)

    return rounding.store("dz", rounding.accumulate("dz", dz, sd))


def route_vjp(
    router_logits: Float[Array, "*#samples T E"],
    topk_ids: Int[Array, "T K"],
    config: MoEConfig,
    d_topk_weights: Float[Array, "*#samples T K"],
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples T E"]:
    """The gradient of router_logits, through the weights (D1). Rows with undefined weights (R4) get NaN."""
    xp = array_namespace(router_logits, d_topk_weights)
    broken = broken_rows(router_logits, config)[..., None]
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
