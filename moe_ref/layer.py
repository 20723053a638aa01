"""The layer: the calls of the other modules and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float, Int
from moe_ref.combine import combine, sum_slots
from moe_ref.experts import experts
from moe_ref.grouping import group, is_slot, permute, unpermute
from moe_ref.numerics import EXACT, Rounding
from moe_ref.routing import route
from moe_ref.types import Grouping, MoEWeights
from moe_ref.validation import check_experts_inputs, check_inputs


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
    xp = array_namespace(x)
    logits = xp.reshape(router_logits, (-1, weights.num_experts))
    rows = xp.astype(xp.reshape(x, (-1, weights.hidden_size)), xp.float64)
    routing = route(logits, weights.config, weights.selection_bias, rounding)
    slots = gather(rows, routing.topk_ids, routing.topk_weights, weights, rounding)
    return xp.reshape(outputs_of(slots, weights, rounding), tuple(x.shape))


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
    top_k = topk_ids.shape[-1]
    rows = xp.astype(xp.reshape(x, (-1, weights.hidden_size)), xp.float64)
    ids = xp.reshape(topk_ids, (-1, top_k))
    slot_weights = xp.astype(xp.reshape(topk_weights, (-1, top_k)), xp.float64)
    slots = gather(rows, ids, slot_weights, weights, rounding)
    return xp.reshape(outputs_of(slots, weights, rounding), tuple(x.shape))


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


def outputs_of(slots: Slots, weights: MoEWeights, rounding: Rounding = EXACT) -> Float[Array, "*#samples T H"]:
    """Experts, unpermute, combine."""
    outputs = experts(slots.rows, slots.grouping.group_offsets, weights, rounding)
    return combined(unpermute(outputs, slots.grouping.inverse), slots, weights, rounding)


def combined(
    outputs: Float[Array, "*#samples S H"], slots: Slots, weights: MoEWeights, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """Slots weighed and summed (C1), or only summed where the weight is in the input already (C3)."""
    if weights.config.scale_input:
        return sum_slots("y", outputs, slots.weights.shape[-1], rounding)
    return combine(outputs, slots.weights, rounding)
