"""Overflow in fp16 on the way to a result within its range (E7).

Most mutants are the specification, rounding at every site and overflowing at one: an intermediate array in fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.honest import specified
from moe_ref.conformance.mutants._registry import range_mutant
from moe_ref.conformance.wrapped import SlotChange, configured, experts, slot_by_slot
from moe_ref.numerics import Nearest
from moe_ref.types import MoEWeights
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Executor


def overflows_at(*sites: str) -> Callable[[Callable[[], None]], SlotChange]:
    """Makes a mutant from a name and a docstring: the specification, overflowing at these sites."""

    def add(named: Callable[[], None]) -> SlotChange:
        def change(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
            return specified(x, ids, w, weights, Nearest(dtype_name(x), overflows=frozenset(sites)))

        change.__name__, change.__doc__ = named.__name__, named.__doc__
        return range_mutant(change)

    return add


@overflows_at("gate_up", "z")
def z_overflows() -> None:
    """Pre-activations are stored in fp16 (E7)."""


@overflows_at("act")
def act_overflows() -> None:
    """The gate's activation is stored in fp16 before the up half multiplies it (E7)."""


@overflows_at("h")
def h_overflows() -> None:
    """Activations are stored in fp16 (E7)."""


@overflows_at("down", "o")
def o_overflows() -> None:
    """The experts' outputs are stored in fp16 (E7)."""


@overflows_at("weighted_o")
def weighted_o_overflows() -> None:
    """The slots' weighted outputs are stored in fp16 before they are summed (E7)."""


@overflows_at("weighted_x")
def weighted_x_overflows() -> None:
    """Inputs times their weights are stored in fp16 (E7, C3)."""


@overflows_at("weighted_dy")
def weighted_dy_overflows() -> None:
    """The upstream gradient times the weights is stored in fp16 (E7)."""


@overflows_at("dh", "dh_sum")
def dh_overflows() -> None:
    """Gradients of activations are stored in fp16 (E7)."""


@overflows_at("d_o")
def d_o_overflows() -> None:
    """What comes back through the norm of an expert's output is stored in fp16 (E7, E8)."""


@overflows_at("dz")
def dz_overflows() -> None:
    """Gradients of pre-activations are stored in fp16 (E7)."""


@overflows_at("dx_slot", "dx_slot_sum")
def dx_of_slots_overflows() -> None:
    """The slots' gradients of x are stored in fp16 before they are summed, or weighted (E7)."""


@overflows_at("dx_slot_weighted")
def weighted_dx_overflows() -> None:
    """The slots' weighted gradients of x are stored in fp16 before they are summed (E7, C3)."""


@overflows_at("gate_up_lora_inner", "gate_up_lora_inner_scaled", "down_lora_inner", "down_lora_inner_scaled")
def adapters_overflow() -> None:
    """The intermediates of an adapter are stored in fp16 (E7, E6)."""


@overflows_at("dx_slot_lora", "dx_slot_lora_scaled", "dh_lora", "dh_lora_scaled")
def adapters_overflow_backward() -> None:
    """The gradients of an adapter's intermediates are stored in fp16 (E7, E6)."""


@range_mutant
def slots_in_x_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The layer runs once for each slot, with each result in x's dtype (E7)."""
    return torch.stack(slot_by_slot(inner, x, ids, w, weights)).sum(0).to(x.dtype)


@range_mutant
def outputs_saturate(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The experts' outputs saturate at the largest number of x's dtype and never become infinite (E7)."""
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
