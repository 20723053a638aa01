"""The layer, forward and backward: the calls of the other modules and nothing else (clauses D1, D2, D3).

Each ``f_vjp``, here and in the modules of routing, experts, grouping and combine, takes the inputs of ``f`` and the
gradient of its output, and returns the gradients of its inputs. Those of the layer and of the experts return the output
too: the gradients need what it is computed from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float, Int
from moe_ref.combine import combine, combine_vjp, dot, sum_slots
from moe_ref.expert_scale import scale_by_expert, scale_by_expert_vjp
from moe_ref.experts import RowsOf, experts, experts_vjp
from moe_ref.grouping import group, is_slot, permute, permute_vjp, unpermute
from moe_ref.moving import widened
from moe_ref.numerics import EXACT, Rounding
from moe_ref.post_expert_norm import normalize, normalize_vjp
from moe_ref.routing import route, route_vjp, weigh
from moe_ref.types import Grouping, MoEGradients, MoEWeights
from moe_ref.validation import check_dy, check_experts_inputs, check_inputs


def moe(
    x: Float[Array, "*batch H"],
    router_logits: Float[Array, "*batch E"],
    weights: MoEWeights,
    rounding: Rounding = EXACT,
) -> Float[Array, "*batch H"]:
    """A Mixture-of-Experts layer, in float64.

    Args:
        x: hidden states; the dtype of the dense projections (T1).
        router_logits: any float dtype; same leading dimensions as ``x``.
        weights: the layer's parameters and configuration.
        rounding: rounding policy; exact by default.

    Returns:
        y, of x's shape, float64.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_inputs(x, router_logits, weights)
    routing = route(
        wide_rows(router_logits), weights.config, weights.selection_bias, rounding, expert_scale=weights.expert_scale
    )
    y = layer(wide_rows(x), routing.topk_ids, routing.topk_weights, weights, rounding)
    return array_namespace(x).reshape(y, tuple(x.shape))


def routed_experts(
    x: Float[Array, "*batch H"],
    topk_ids: Int[Array, "*batch K"],
    topk_weights: Float[Array, "*batch K"],
    weights: MoEWeights,
    rounding: Rounding = EXACT,
) -> Float[Array, "*batch H"]:
    """The layer with routing already done elsewhere; ids outside [0, E) are empty slots (R7).

    Args:
        x: hidden states; the dtype of the dense projections (T1).
        topk_ids: int32 or int64; same leading dimensions as ``x``. Duplicates in a row add up.
        topk_weights: any float dtype; the shape of ``topk_ids``.
        weights: the layer's parameters and configuration.
        rounding: rounding policy; exact by default.

    Returns:
        y, of x's shape, float64.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_experts_inputs(x, topk_ids, topk_weights, weights)
    xp = array_namespace(x)
    ids = xp.reshape(topk_ids, (-1, topk_ids.shape[-1]))
    y = layer(wide_rows(x), ids, wide_rows(topk_weights), weights, rounding)
    return xp.reshape(y, tuple(x.shape))


def wide_rows(array: Float[Array, "*batch N"]) -> Float[Array, "T N"]:
    """The same numbers in float64, with one leading dimension for all."""
    xp = array_namespace(array)
    return widened(xp.reshape(array, (-1, array.shape[-1])))


@dataclass(frozen=True, eq=False)
class Slots:
    """What stands between the choice of experts and the experts.

    Attributes:
        grouping: the slots sorted by expert.
        weights: zero for empty slots, whatever weight they had (R7).
        tokens: in expert order, x of each row.
        rows: in expert order, what the experts are given: x, or with ``scale_input`` its product with the weight (C3).
    """

    grouping: Grouping
    weights: Float[Array, "*#samples T K"]
    tokens: Float[Array, "*#samples S H"]
    rows: Float[Array, "*#samples S H"]


def gather(
    x: Float[Array, "*#samples T H"],
    topk_ids: Int[Array, "T K"],
    topk_weights: Float[Array, "*#samples T K"],
    weights: MoEWeights,
    rounding: Rounding = EXACT,
) -> Slots:
    """Groups the slots and permutes the tokens."""
    xp = array_namespace(x)
    grouping = group(topk_ids, weights.num_experts)
    mask = is_slot(topk_ids, weights.num_experts)
    slot_weights = xp.where(mask, topk_weights, xp.zeros_like(topk_weights))
    rows = tokens = permute(x, grouping.order, topk_ids.shape[-1])
    if weights.config.scale_input:
        rows = rounding.store("weighted_x", row_weights(slot_weights, grouping) * tokens)
    return Slots(grouping, slot_weights, tokens, rows)


def row_weights(topk_weights: Float[Array, "*#samples T K"], grouping: Grouping) -> Float[Array, "*#samples S 1"]:
    """The weight of each row, in expert order."""
    xp = array_namespace(topk_weights)
    return unpermute(xp.reshape(topk_weights, (*topk_weights.shape[:-2], -1, 1)), grouping.order)


def layer(
    x: Float[Array, "*#samples T H"],
    topk_ids: Int[Array, "T K"],
    topk_weights: Float[Array, "*#samples T K"],
    weights: MoEWeights,
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples T H"]:
    """Gather, experts, norm, unpermute, combine. A leading axis of samples is carried through."""
    slots = gather(x, topk_ids, topk_weights, weights, rounding)
    outputs = experts(slots.rows, slots.grouping.group_offsets, weights, rounding)
    outputs = normalize(outputs, weights, rounding)
    return combined(unpermute(outputs, slots.grouping.inverse), slots, weights, rounding)


def combined(
    outputs: Float[Array, "*#samples S H"], slots: Slots, weights: MoEWeights, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """Slots weighed and summed (C1), or only summed where the weight is in the input already (C3)."""
    if weights.config.scale_input:
        return sum_slots("y", outputs, slots.weights.shape[-1], rounding)
    return combine(outputs, slots.weights, rounding)


def moe_vjp(
    x: Float[Array, "*batch H"],
    router_logits: Float[Array, "*batch E"],
    weights: MoEWeights,
    dy: Float[Array, "*batch H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*batch H"], MoEGradients]:
    """Returns y of `moe` and the gradients of <dy, y>, in float64.

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
    logits = wide_rows(router_logits)
    topk_ids = route(logits, weights.config, weights.selection_bias).topk_ids
    y, gradients = layer_vjp(wide_rows(x), logits, topk_ids, None, weights, wide_rows(dy), rounding)
    return _with_shapes(y, gradients, x.shape, router_logits.shape)


def routed_experts_vjp(
    x: Float[Array, "*batch H"],
    topk_ids: Int[Array, "*batch K"],
    topk_weights: Float[Array, "*batch K"],
    weights: MoEWeights,
    dy: Float[Array, "*batch H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*batch H"], MoEGradients]:
    """Returns y of `routed_experts` and the gradients of <dy, y>, in float64.

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
    ids = array_namespace(x).reshape(topk_ids, (-1, topk_ids.shape[-1]))
    y, gradients = layer_vjp(wide_rows(x), None, ids, wide_rows(topk_weights), weights, wide_rows(dy), rounding)
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
    rows_of: RowsOf | None = None,
) -> tuple[Float[Array, "*#samples T H"], MoEGradients]:
    """Forward and backward with the choice of experts given: it has no gradient (D1), and no sample chooses again.

    Exactly one of ``router_logits`` and ``topk_weights`` is given. A leading axis of samples is carried through. With
    ``rows_of``, only the rows that it names are computed of a matrix's or a factor's gradient.
    """
    xp = array_namespace(x)
    scale, unscaled = weights.expert_scale, topk_weights
    if topk_weights is None:
        unscaled = weigh(router_logits, topk_ids, weights.config, rounding)
        topk_weights = scale_by_expert(unscaled, topk_ids, scale, rounding)
    slots = gather(x, topk_ids, topk_weights, weights, rounding)
    top_k, grouping, scaled = topk_ids.shape[-1], slots.grouping, weights.config.scale_input
    d_outputs = xp.repeat(dy, top_k, axis=-2) if scaled else combine_vjp(slots.weights, dy, rounding)
    upstream, d_norm = unpermute(d_outputs, grouping.order), None
    if weights.post_expert_norm is not None:
        before = experts(slots.rows, grouping.group_offsets, weights, rounding)
        upstream, d_norm = normalize_vjp(before, weights, upstream, rounding)
    outputs, d_rows, d_parameters = experts_vjp(
        slots.rows, grouping.group_offsets, weights, upstream, rounding, rows_of
    )
    outputs = unpermute(normalize(outputs, weights, rounding), grouping.inverse)
    y = combined(outputs, slots, weights, rounding)
    if scaled:
        d_weights = unpermute(dot(slots.tokens, d_rows, rounding), grouping.inverse)
        d_rows = rounding.store("dx_slot_weighted", row_weights(slots.weights, grouping) * d_rows)
    else:
        d_weights = dot(outputs, xp.repeat(dy, top_k, axis=-2), rounding)
    d_weights = xp.reshape(d_weights, (*d_weights.shape[:-2], -1, top_k))
    mask = is_slot(topk_ids, weights.num_experts)
    d_weights = xp.where(mask, d_weights, xp.zeros_like(d_weights))
    d_logits = d_scale = None
    if router_logits is not None:
        d_unscaled = d_weights
        if scale is not None:
            d_unscaled, d_scale = scale_by_expert_vjp(unscaled, topk_ids, scale, d_weights, rounding)
        d_logits = route_vjp(router_logits, topk_ids, weights.config, d_unscaled, rounding)
    dx = permute_vjp(d_rows, grouping.inverse, top_k, rounding)
    return y, MoEGradients(dx, d_logits, d_weights, **d_parameters, expert_scale=d_scale, post_expert_norm=d_norm)
