"""Low-rank adapters that are lost, mistaken, or left out of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import slot_mutant
from moe_ref.conformance.wrapped import experts
from moe_ref.types import LORA_FACTORS, MoEWeights

if TYPE_CHECKING:
    from executors import Executor


def _changed(
    weights: MoEWeights, change: Callable[[Tensor], Tensor], names: tuple[str, ...] = LORA_FACTORS
) -> MoEWeights:
    parameters = weights.parameters()
    return weights.with_parameters({n: change(parameters[n]) for n in names if n in parameters})


@slot_mutant
def adapters_not_applied(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The adapters are silently left out; their gradients are zeros (E6)."""
    return experts(inner, x, ids, w, _changed(weights, lambda factor: factor * 0))


@slot_mutant
def adapters_without_gradient(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The adapters act, but no gradient reaches them (E6)."""
    return experts(inner, x, ids, w, _changed(weights, torch.Tensor.detach))


@slot_mutant
def adapter_scaled_twice(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The scaling counts once more (E6)."""
    lora = weights.lora
    if lora is None:
        return experts(inner, x, ids, w, weights)
    squared = replace(lora, gate_up_scaling=lora.gate_up_scaling**2, down_scaling=lora.down_scaling**2)
    return experts(inner, x, ids, w, replace(weights, lora=squared))


@slot_mutant
def adapter_of_neighbour(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each expert has its neighbour's adapter of the down projection (E6)."""
    return experts(inner, x, ids, w, _changed(weights, lambda f: f.roll(1, 0), ("down_lora_a", "down_lora_b")))


@slot_mutant
def lora_b_read_expert_slowest(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """B as PEFT stores it, (out, r*E) with the expert fastest, is read with the expert slowest (E6)."""

    def mistaken(factor: Tensor) -> Tensor:
        experts_, out, rank = factor.shape
        stored = factor.permute(1, 2, 0).reshape(out, rank * experts_)
        return stored.view(out, experts_, rank).permute(1, 0, 2)

    return experts(inner, x, ids, w, _changed(weights, mistaken, ("gate_up_lora_b", "down_lora_b")))


@slot_mutant
def d3_adapter_missing(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """D topk_weights forgets the part of the down projection's adapter (D3)."""
    right = experts(inner, x, ids, w.detach(), weights)
    without = _changed(weights.map(torch.Tensor.detach), torch.zeros_like, ("down_lora_a", "down_lora_b"))
    wrong = experts(inner, x.detach(), ids, w, without)
    return right + (wrong - wrong.detach())
