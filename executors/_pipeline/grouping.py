"""Slots sorted by expert, in torch, without a host synchronisation (clauses G1, R7)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

GATHERED = 2**18  # numbers of all slots' outputs that are gathered at once: 1 MiB


def group(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts the slots stably by expert; empty slots come last and belong to no group.

    Args:
        topk_ids: [T, K], int32 or int64; ids outside [0, E) are empty slots.
        num_experts: E.

    Returns:
        order [S]: the slot in each row; group_offsets [E + 1]: expert e has rows group_offsets[e] to
        group_offsets[e + 1] - 1. Both int64.
    """
    ids = topk_ids.reshape(-1)
    ids = ids.masked_fill((ids < 0) | (ids > num_experts), num_experts)
    sorted_ids, order = torch.sort(ids, stable=True)
    edges = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(sorted_ids, edges)


def expert_of_rows(topk_ids: Tensor, order: Tensor, num_experts: int) -> Tensor:
    """[S] The expert of each row; any expert for the rows of empty slots."""
    return topk_ids.reshape(-1)[order].clamp(0, num_experts - 1)


def inverse_of(order: Tensor) -> Tensor:
    """[S] The row of each slot."""
    places = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def slot_weights(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """[T, K] Weights in at least fp32 (R6), zero for empty slots whatever stands there (R7)."""
    wide = torch.promote_types(dtype, torch.float32)
    return topk_weights.to(wide).masked_fill((topk_ids < 0) | (topk_ids >= num_experts), 0.0)


def combine(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> Tensor:
    """[T, H] The sum over each token's slots, in increasing k, in at least fp32, to be rounded once (C1).

    With many tokens one slot of each is gathered at a time: it stays in the cache, and nothing of T*K*H is made. With
    few tokens one gather of all slots takes less time than K small ones.

    Args:
        rows: [S, H] in expert order; zeros for empty slots.
        row_of_slot: [T, K].
        weights: [T, K], or None for ones.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    tokens, top_k = row_of_slot.shape
    total = torch.zeros(tokens, rows.shape[1], dtype=wide, device=rows.device)
    if row_of_slot.numel() * rows.shape[1] <= GATHERED:
        gathered = rows.index_select(0, row_of_slot.t().reshape(-1)).to(wide)
        slots: Iterable[Tensor] = gathered.view(top_k, tokens, rows.shape[1]).unbind()
    else:
        slots = (rows.index_select(0, row_of_slot[:, k]).to(wide) for k in range(top_k))
    if weights is None:
        for own in slots:
            total += own
    else:
        for own, weight in zip(slots, weights.t().unsqueeze(-1).unbind(), strict=True):
            total.addcmul_(own, weight)
    return total
