"""The backward pass, written out: one function per forward function (clauses D1, D2, D3).

Each ``f_vjp``, here, in `experts_vjp` and in `routing_vjp`, takes the inputs of ``f`` and the gradient of its output,
and returns the gradients of its inputs. Those of the layer and of the experts return the output too: the gradients need
what it is computed from.
"""

from __future__ import annotations

from dataclasses import replace

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float, Int
from moe_ref.combine import sum_slots
from moe_ref.experts_vjp import experts_vjp
from moe_ref.grouping import is_slot, unpermute
from moe_ref.layer import combined, gather, row_weights
from moe_ref.numerics import EXACT, Rounding, sum_sd
from moe_ref.routing import route, weigh
from moe_ref.routing_vjp import route_vjp
from moe_ref.types import MoEGradients, MoEWeights
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
    topk_ids = route(logits, weights.config, weights.selection_bias).topk_ids
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
    slots = gather(x, topk_ids, topk_weights, weights, rounding)
    top_k, grouping, scaled = topk_ids.shape[-1], slots.grouping, weights.config.scale_input
    d_outputs = xp.repeat(dy, top_k, axis=-2) if scaled else combine_vjp(slots.weights, dy, rounding)
    upstream = unpermute(d_outputs, grouping.order)
    outputs, d_rows, d_parameters = experts_vjp(slots.rows, grouping.group_offsets, weights, upstream, rounding)
    outputs = unpermute(outputs, grouping.inverse)
    y = combined(outputs, slots, weights, rounding)
    if scaled:
        d_weights = unpermute(dot(slots.tokens, d_rows, rounding), grouping.inverse)
        d_rows = rounding.store("dx_slot_weighted", row_weights(slots.weights, grouping) * d_rows)
    else:
        d_weights = dot(outputs, xp.repeat(dy, top_k, axis=-2), rounding)
    d_weights = xp.reshape(d_weights, (*d_weights.shape[:-2], -1, top_k))
    mask = is_slot(topk_ids, weights.num_experts)
    d_weights = xp.where(mask, d_weights, xp.zeros_like(d_weights))
    d_logits = None
    if router_logits is not None:
        d_logits = route_vjp(router_logits, topk_ids, weights.config, d_weights, rounding)
    dx = permute_vjp(d_rows, grouping.inverse, top_k, rounding)
    return y, MoEGradients(dx, d_logits, d_weights, **d_parameters)


def combine_vjp(
    topk_weights: Float[Array, "*#samples T K"], dy: Float[Array, "*#samples T H"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples S H"]:
    """The gradient of the experts' outputs, w dy. That of the weights is `dot` of outputs and dy, unweighted (D3)."""
    xp = array_namespace(topk_weights, dy)
    upstream = xp.repeat(dy, topk_weights.shape[-1], axis=-2)
    slot_weights = xp.reshape(topk_weights, (*topk_weights.shape[:-2], -1, 1))
    return rounding.store("weighted_dy", slot_weights * upstream)


def dot(
    left: Float[Array, "*#samples S H"], right: Float[Array, "*#samples S H"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples S 1"]:
    """The products of rows with rows: the gradient of each slot's weight (D3)."""
    xp = array_namespace(left, right)
    terms = left * right
    total = xp.sum(terms, axis=-1, keepdims=True)
    squares = xp.sum(terms * terms, axis=-1, keepdims=True)
    return rounding.accumulate("d_topk_weights", total, lambda: sum_sd(total, squares, terms.shape[-1]))


def permute_vjp(
    d_rows: Float[Array, "*#samples S H"], inverse: Int[Array, " S"], top_k: int, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """dx[t] is the sum, in increasing k, over the token's slots."""
    return sum_slots("dx", unpermute(d_rows, inverse), top_k, rounding)
