"""Right outputs and right gradients, whose own derivatives are silently wrong (D1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ref.conformance.honest import activated, loop
from moe_ref.conformance.mutants._registry import second_mutant
from moe_ref.conformance.wrapped import experts
from moe_ref.types import MoEConfig, MoEWeights

if TYPE_CHECKING:
    from executors import Executor


@second_mutant
def gradients_are_constants(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The backward pass is no function of autograd: its results depend on nothing (D1)."""
    own = weights.parameters()
    return _Call.apply(inner, ids, weights, tuple(own), x, w, *own.values())  # type: ignore[no-untyped-call]


@second_mutant
def activation_held_in_backward(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The slope of the activation is a constant, because z was kept without its graph (D1)."""
    return loop(x, ids, w, weights, lambda z, config: _Activation.apply(z, config))  # type: ignore[no-untyped-call]


@second_mutant
def upstream_gradient_held(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The upstream gradient is a constant: its kernel reads it without its graph (D1)."""
    return _HeldUpstream.apply(loop(x, ids, w, weights))  # type: ignore[no-untyped-call]


@second_mutant
def weights_held_in_combine(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The combine's backward pass reads weights and outputs as constants (D1)."""
    if weights.config.scale_input:
        return _HeldUpstream.apply(loop(x, ids, w, weights))  # type: ignore[no-untyped-call]
    valid = (ids >= 0) & (ids < weights.num_experts)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for k in range(ids.shape[1]):
        o = loop(x, ids[:, k : k + 1], torch.ones_like(w[:, k : k + 1]), weights)
        own = torch.where(valid[:, k : k + 1], w[:, k : k + 1], 0).to(wide)
        y = y + _Product.apply(own, o.to(wide))  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


class _Call(torch.autograd.Function):
    """A call of the inner executor, differentiated where autograd does not see it."""

    @staticmethod
    def forward(
        ctx: Any,
        inner: Executor,
        ids: Tensor,
        weights: MoEWeights,
        names: tuple[str, ...],
        x: Tensor,
        w: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.inner, ctx.weights, ctx.names = inner, weights, names
        ctx.save_for_backward(ids, x, w, *parameters)
        with torch.no_grad():
            return experts(inner, x, ids, w, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_(own) for tensor, own in zip(tensors, needed, strict=True)]
            x, w, *parameters = leaves
            weights = ctx.weights.with_parameters(dict(zip(ctx.names, parameters, strict=True)))
            y = experts(ctx.inner, x, ids, w, weights)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(y, asked, dy.detach()))
        return None, None, None, None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


class _Activation(torch.autograd.Function):
    """The activation, with z as a constant in its backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, config: MoEConfig) -> Tensor:
        ctx.z, ctx.config = z.detach(), config
        return activated(z, config)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            z = ctx.z.clone().requires_grad_()
            (dz,) = torch.autograd.grad(activated(z, ctx.config), z, dh, create_graph=torch.is_grad_enabled())
        return dz, None


class _HeldUpstream(torch.autograd.Function):
    """The identity, whose upstream gradient is a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.detach().clone()


class _Product(torch.autograd.Function):
    """w o [T, H] of w [T, 1] and o, with both as constants in its backward pass."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, o: Tensor) -> Tensor:
        ctx.kept = w.detach(), o.detach()
        return w * o

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        w, o = ctx.kept
        return (dy * o).sum(1, keepdim=True), dy * w
