"""Sorts slots by expert (clause G1), and moves rows between token order and expert order."""

from __future__ import annotations

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Bool, Float, Int
from moe_ref.combine import sum_slots
from moe_ref.numerics import EXACT, Rounding
from moe_ref.types import Grouping


def is_slot(topk_ids: Int[Array, "T K"], num_experts: int) -> Bool[Array, "T K"]:
    """False for empty slots, whose ids are outside [0, E): so expert parallelism marks foreign experts (R7)."""
    return (topk_ids >= 0) & (topk_ids < num_experts)


def group(topk_ids: Int[Array, "T K"], num_experts: int) -> Grouping:
    """Sorts the slots by expert, stably; empty slots come last and belong to no group."""
    xp = array_namespace(topk_ids)
    ids = xp.where(is_slot(topk_ids, num_experts), topk_ids, xp.full_like(topk_ids, num_experts))
    ids = xp.reshape(ids, (-1,))
    order = xp.argsort(ids, stable=True)
    edges = xp.arange(num_experts + 1, dtype=ids.dtype, device=device(ids))
    group_offsets = xp.astype(xp.searchsorted(xp.take(ids, order, axis=0), edges), xp.int64)  # JAX counts in int32
    return Grouping(order, xp.argsort(order, stable=True), group_offsets[1:] - group_offsets[:-1], group_offsets)


def permute(x: Float[Array, "*#samples T H"], order: Int[Array, " S"], top_k: int) -> Float[Array, "*#samples S H"]:
    """Rows in expert order: row i is the token of slot order[i]."""
    return array_namespace(x).take(x, order // top_k, axis=-2)


def unpermute(rows: Float[Array, "*#samples S H"], inverse: Int[Array, " S"]) -> Float[Array, "*#samples S H"]:
    """Rows back in slot order."""
    return array_namespace(rows).take(rows, inverse, axis=-2)


def permute_vjp(
    d_rows: Float[Array, "*#samples S H"], inverse: Int[Array, " S"], top_k: int, rounding: Rounding = EXACT
) -> Float[Array, "*#samples T H"]:
    """dx[t] is the sum, in increasing k, over the token's slots."""
    return sum_slots("dx", unpermute(d_rows, inverse), top_k, rounding)
