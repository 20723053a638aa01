"""Slots sorted by expert, in torch, without a host synchronisation (clauses G1, R7)."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_slots(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[S] The slot in each row: slots stably sorted by expert, empty ones last.

    Args:
        topk_ids: [T, K], int32 or int64; ids outside [0, E) are empty slots.
        num_experts: E.
    """
    return torch.sort(_flat_ids(topk_ids, num_experts), stable=True).indices


def offsets(topk_ids: Tensor, order: Tensor, num_experts: int) -> Tensor:
    """[E + 1] int64: expert e has rows offsets[e] .. offsets[e + 1] - 1; empty slots belong to no group."""
    ids = _flat_ids(topk_ids, num_experts)
    edges = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return torch.searchsorted(ids[order], edges)


def _flat_ids(topk_ids: Tensor, num_experts: int) -> Tensor:
    ids = topk_ids.reshape(-1)
    return ids.masked_fill((ids < 0) | (ids > num_experts), num_experts)


def expert_of_rows(topk_ids: Tensor, order: Tensor, num_experts: int) -> Tensor:
    """[S] The expert of each row; any expert for the rows of empty slots."""
    return topk_ids.reshape(-1)[order].clamp(0, num_experts - 1)


def inverse_of(order: Tensor) -> Tensor:
    """[S] The row of each slot."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def slot_weights(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """[T, K] Weights in at least fp32 (R6), zero for empty slots whatever stands there (R7)."""
    wide = torch.promote_types(dtype, torch.float32)
    return topk_weights.to(wide).masked_fill((topk_ids < 0) | (topk_ids >= num_experts), 0.0)


def combine(outputs: Tensor, weights: Tensor | None) -> Tensor:
    """y [T, H] from outputs [T, K, H] and weights [T, K], None for ones: in increasing k, rounded once (C1)."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    slots = outputs.to(wide)
    if weights is None:
        total = slots[:, 0].clone()
        for k in range(1, slots.shape[1]):
            total += slots[:, k]
    else:
        total = slots[:, 0] * weights[:, 0, None]
        for k in range(1, slots.shape[1]):
            total.addcmul_(slots[:, k], weights[:, k, None])
    return total.to(outputs.dtype)
