"""What a forward pass keeps for backward: moved, packed, or computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import save_on_cpu as saving_on_cpu
from torch.autograd.graph import saved_tensors_hooks as saving_by_hooks
from torch.utils.checkpoint import checkpoint

from moe_ref.conformance.citizen.case import Case
from moe_ref.conformance.problems.declared import LAYOUTS

if TYPE_CHECKING:
    from torch import Tensor


def save_on_cpu(case: Case) -> None:
    """Under torch.autograd.graph.save_on_cpu, gradients have the same bits."""
    case.needs_backward()
    inputs = case.inputs()
    with saving_on_cpu(pin_memory=False):
        y = case.call(inputs)
    case.demand_same(case.backward(inputs, y), "under save_on_cpu")


def saved_tensors_hooks(case: Case) -> None:
    """What saved_tensors_hooks pack away comes back as other tensors, in other strides, with the same gradients."""
    case.needs_backward()
    unpacking: list[tuple[Case, Callable[[Tensor], Tensor]]] = [(case, torch.clone)]
    if {*LAYOUTS.values()} <= case.executor.capabilities.strided:
        unpacking.append((case.exact(), _turned))  # in other strides a sum has another order
    for layer, unpack in unpacking:
        inputs = layer.inputs()
        with saving_by_hooks(lambda tensor: tensor.detach().clone(), unpack):
            y = layer.call(inputs)
        layer.demand_same(layer.backward(inputs, y), "with saved tensors packed by hooks")


def _turned(tensor: Tensor) -> Tensor:
    """The same numbers, stored with the last two axes swapped."""
    return tensor.clone() if tensor.ndim < 2 else tensor.mT.contiguous().mT


def checkpoints(case: Case) -> None:
    """torch.utils.checkpoint gives the same bits, reentrant or not."""
    case.needs_backward()
    for reentrant in (False, True):
        inputs = case.inputs()
        y = checkpoint(
            lambda x, inputs=inputs: case.call(replace(inputs, x=x)),
            inputs.x,
            use_reentrant=reentrant,
        )
        case.demand_same(case.backward(inputs, y), f"under checkpoint(use_reentrant={reentrant})")
