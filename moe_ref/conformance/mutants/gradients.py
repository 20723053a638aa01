"""Right outputs, wrong gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import dense_mutant, slot_mutant
from moe_ref.conformance.mutants.experts import with_own_down_bias
from moe_ref.conformance.wrapped import experts
from moe_ref.types import LORA_FACTORS, PROJECTIONS, MoEWeights

if TYPE_CHECKING:
    from executors import Executor


class _ChangeGradient(torch.autograd.Function):
    """Identity forward; applies a function to the gradient backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def change_gradient(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The value itself, whose gradient is changed."""
    return _ChangeGradient.apply(value, change)  # type: ignore[no-untyped-call]


@dense_mutant
def empty_experts_gradient_stale(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient of an expert without tokens is whatever the memory held (D2)."""
    used = torch.zeros(weights.num_experts, dtype=torch.bool, device=x.device)
    used[ids[(ids >= 0) & (ids < weights.num_experts)].long()] = True
    stale = change_gradient(
        weights.gate_up_proj, lambda g: torch.where(used[:, None, None], g, torch.full_like(g, 1e-4))
    )
    return experts(inner, x, ids, w, replace(weights, gate_up_proj=stale))


@dense_mutant
def weight_gradient_lacks_one_row(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last row of down_proj's gradient is never written (D1)."""
    damaged = change_gradient(weights.down_proj, lambda g: torch.cat([g[:, :-1], torch.empty_like(g[:, -1:])], dim=1))
    return experts(inner, x, ids, w, replace(weights, down_proj=damaged))


@slot_mutant
def x_gradient_of_first_slot_only(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Dx leaves out the token's other slots: the last one is overwritten, not added (D1)."""
    first = torch.where(torch.arange(ids.shape[1], device=x.device) == 0, ids, torch.full_like(ids, -1))
    rest = torch.where(torch.arange(ids.shape[1], device=x.device) == 0, torch.full_like(ids, -1), ids)
    return experts(inner, x, first, w, weights) + experts(inner, x.detach(), rest, w, weights)


@slot_mutant
def d3_bias_term_missing(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """D topk_weights forgets <dy, b_d> (D3)."""
    return with_own_down_bias(inner, x, ids, w, weights, w.detach())


@slot_mutant
def bias_gradients_in_x_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Sums the gradients of biases over tokens in their own dtype (E2)."""
    return _token_by_token(inner, x, ids, w, weights, {"gate_up_proj_bias", "down_proj_bias"})


@slot_mutant
def adapter_gradients_in_x_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Sums the gradients of adapters over tokens in their own dtype (E2)."""
    return _token_by_token(inner, x, ids, w, weights, set(LORA_FACTORS))


@dense_mutant
def weight_gradients_in_x_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Sums the gradients of projections over tiles of 32 tokens in x's dtype (E2)."""
    return _tile_by_tile(inner, x, ids, w, weights, {*PROJECTIONS}, 32)


def _token_by_token(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, names: set[str]) -> Tensor:
    return _tile_by_tile(inner, x, ids, w, weights, names, 1)


def _tile_by_tile(
    inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, names: set[str], rows: int
) -> Tensor:
    """The right output; gradients of these parameters come from a call for each tile, and autograd adds them."""
    parameters = weights.parameters()
    kept = {name: value.detach() for name, value in parameters.items() if name in names}
    others = {name: value.detach() for name, value in parameters.items() if name not in names}
    y = experts(inner, x, ids, w, weights.with_parameters(kept))
    own = weights.with_parameters(others)
    x, ids, w = x.detach(), ids.detach(), w.detach()
    each = (slice(token, token + rows) for token in range(0, x.shape[0], rows))
    alone = [experts(inner, x[tile], ids[tile], w[tile], own) for tile in each]
    return y + _nothing_but_gradients(torch.cat(alone)) if alone else y


def _nothing_but_gradients(value: Tensor) -> Tensor:
    return value - value.detach()
