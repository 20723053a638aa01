"""Overflow in fp16 on the way to a result that is within its range (E7).

Most are the specification that rounds at every site and overflows at one: an intermediate array in fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.honest import specified
from moe_ref.conformance.mutants._registry import range_mutant
from moe_ref.conformance.wrapped import configured, experts
from moe_ref.numerics import Nearest
from moe_ref.types import MoEWeights
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Executor


def _overflowing(x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, *sites: str) -> Tensor:
    return specified(x, ids, w, weights, Nearest(dtype_name(x), overflows=frozenset(sites)))


@range_mutant
def z_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Pre-activations are stored in fp16 (E7)."""
    return _overflowing(x, ids, w, weights, "gate_up", "z")


@range_mutant
def act_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gate's activation is stored in fp16 before the up half multiplies it (E7)."""
    return _overflowing(x, ids, w, weights, "act")


@range_mutant
def h_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Activations are stored in fp16 (E7)."""
    return _overflowing(x, ids, w, weights, "h")


@range_mutant
def o_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The experts' outputs are stored in fp16 (E7)."""
    return _overflowing(x, ids, w, weights, "down", "o")


@range_mutant
def weighted_o_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The slots' weighted outputs are stored in fp16 before they are summed (E7)."""
    return _overflowing(x, ids, w, weights, "weighted_o")


@range_mutant
def weighted_x_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Inputs times their weights are stored in fp16 (E7, C3)."""
    return _overflowing(x, ids, w, weights, "weighted_x")


@range_mutant
def weighted_dy_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The upstream gradient times the weights is stored in fp16 (E7)."""
    return _overflowing(x, ids, w, weights, "weighted_dy")


@range_mutant
def dh_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Gradients of activations are stored in fp16 (E7)."""
    return _overflowing(x, ids, w, weights, "dh", "dh_sum")


@range_mutant
def dz_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Gradients of pre-activations are stored in fp16 (E7)."""
    return _overflowing(x, ids, w, weights, "dz")


@range_mutant
def dx_of_slots_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The slots' gradients of x are stored in fp16 before they are summed, or weighted (E7)."""
    return _overflowing(x, ids, w, weights, "dx_slot", "dx_slot_sum")


@range_mutant
def weighted_dx_overflows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The slots' weighted gradients of x are stored in fp16 before they are summed (E7, C3)."""
    return _overflowing(x, ids, w, weights, "dx_slot_weighted")


@range_mutant
def adapters_overflow(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """What stands between an adapter's factors is stored in fp16 (E7, E6)."""
    of_both = (f"{name}_lora_inner{scaled}" for name in ("gate_up", "down") for scaled in ("", "_scaled"))
    return _overflowing(x, ids, w, weights, *of_both)


@range_mutant
def adapters_overflow_backward(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient of what stands between an adapter's factors is stored in fp16 (E7, E6)."""
    of_both = (f"{name}_lora{scaled}" for name in ("dx_slot", "dh") for scaled in ("", "_scaled"))
    return _overflowing(x, ids, w, weights, *of_both)


@range_mutant
def slots_in_x_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The layer once for each slot, each result in x's dtype (E7)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = [experts(inner, x, ids[:, k : k + 1], w[:, k : k + 1], weights).to(wide) for k in range(ids.shape[1])]
    return torch.stack(parts).sum(0).to(x.dtype)


@range_mutant
def outputs_saturate(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The experts' outputs stop at x's largest number, with no infinity to be seen (E7)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for k in range(ids.shape[1]):
        weight = w[:, k : k + 1]
        before = weight if weights.config.scale_input else torch.ones_like(weight)
        o = experts(inner, x, ids[:, k : k + 1], before, weights)
        o = o.nan_to_num().to(wide)
        y = y + (o if weights.config.scale_input else torch.where(o == 0, o, weight * o))
    return y.to(x.dtype)


@range_mutant
def inputs_weighted_in_x_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """With scale_input, weights multiply x in its own dtype, before the experts (E7, C3)."""
    if not weights.config.scale_input:
        return experts(inner, x, ids, w, weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    plain, ones = configured(weights, scale_input=False), torch.ones_like(w[:, :1])
    slots = [(ids[:, k : k + 1], (w[:, k : k + 1] * x).to(x.dtype)) for k in range(ids.shape[1])]
    return torch.stack([experts(inner, rows, own, ones, plain).to(wide) for own, rows in slots]).sum(0).to(x.dtype)
