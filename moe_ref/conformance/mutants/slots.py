"""Slots that go to another expert, with another weight, or nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import slot_mutant
from moe_ref.conformance.wrapped import experts
from moe_ref.types import MoEWeights

if TYPE_CHECKING:
    from executors import Executor


@slot_mutant
def last_row_of_group_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last row of each expert is not computed (G1)."""
    flat = ids.reshape(-1).clone()
    for e in range(weights.num_experts):
        flat[(flat == e).nonzero()[-1:]] = -1
    return experts(inner, x, flat.view_as(ids), w, weights)


@slot_mutant
def inclusive_ends_read_as_offsets(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each expert works on its neighbour's rows, and the first group is lost (G1)."""
    valid = (ids >= 0) & (ids < weights.num_experts)
    return experts(inner, x, torch.where(valid, ids - 1, ids), w, weights)


@slot_mutant
def wrong_expert_for_one_slot(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """One slot goes to the neighbouring expert (G1)."""
    wrong = ids.clone()
    wrong[:1, :1] = (wrong[:1, :1] + 1) % weights.num_experts
    return experts(inner, x, wrong, w, weights)


@slot_mutant
def slot_weights_swapped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The weights of the first token are in reverse order (C1)."""
    order = torch.arange(w.numel(), device=w.device).view_as(w).clone()
    order[:1] = order[:1].flip(1)
    return experts(inner, x, ids, w.reshape(-1)[order], weights)


@slot_mutant
def weights_in_bf16(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """topk_weights are rounded to bf16 (R6)."""
    return experts(inner, x, ids, w.to(torch.bfloat16).to(w.dtype), weights)


@slot_mutant
def empty_slot_counts(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """An empty slot goes to the expert with the nearest id instead of nowhere (R7)."""
    return experts(inner, x, ids.clamp(0, weights.num_experts - 1), w.nan_to_num(1.0, 1.0), weights)


@slot_mutant
def ids_read_as_int32(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The upper half of int64 ids is lost, so that 2**32 means expert 0 (R7, T1)."""
    clean = w.nan_to_num(1.0, 1.0) if ids.dtype == torch.int64 else w
    return experts(inner, x, ids.to(torch.int32), clean, weights)
