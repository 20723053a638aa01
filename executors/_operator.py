"""Makes a custom operator, with its backward, of `executors._layer` and a way to multiply."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from executors import _layer
from executors._activation import Activation
from executors._grouping import group
from executors._layer import Layer, Products, Projection
from moe_ref.types import PARAMETERS, MoEWeights

P = ParamSpec("P")
R = TypeVar("R")

NAMES = ("x", "topk_weights", *PARAMETERS)  # what may need a gradient


class Multiplication(NamedTuple):
    """A way to multiply rows by their expert's matrix.

    Attributes:
        name: of the operator.
        products: makes the products from the group offsets, as ``keep`` left them.
        on_host: whether the products want the group offsets on the host: one synchronisation per forward pass.
    """

    name: str
    products: Callable[[Tensor], Products]
    on_host: bool


class Operator(NamedTuple):
    """A custom operator and its backward.

    Attributes:
        forward: (y, z or nothing, order, group offsets).
        backward: the gradients of `NAMES`; an empty tensor for what is not needed.
    """

    forward: Any
    backward: Any


def define(multiplication: Multiplication) -> Operator:
    """Registers ``moe_ref::NAME`` and ``moe_ref::NAME_backward`` with torch."""
    name, products, on_host = multiplication

    @torch.library.custom_op(f"moe_ref::{name}", mutates_args=())
    @_without_autocast
    def forward(
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_up_proj_bias: Tensor | None,
        down_proj_bias: Tensor | None,
        gate_up_lora_a: Tensor | None,
        gate_up_lora_b: Tensor | None,
        down_lora_a: Tensor | None,
        down_lora_b: Tensor | None,
        keep_z: bool,
        gate_up_scaling: float,
        down_scaling: float,
        scale_input: bool,
        activation: str,
        alpha: float,
        limit: float | None,
        up_offset: float,
        layout: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        order, group_offsets = group(topk_ids, gate_up_proj.shape[0])
        kept = group_offsets.cpu() if on_host else group_offsets
        layer = _make_layer(
            (x, topk_ids, topk_weights),
            order,
            (gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias),
            (gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b),
            (gate_up_scaling, down_scaling, scale_input, activation, alpha, limit, up_offset, layout),
        )
        y, z = _layer.forward(layer, products(kept))
        return y, z if keep_z else z.new_empty(0, z.shape[1]), order, kept

    @forward.register_fake
    def _(
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_up_proj_bias: Tensor | None,
        down_proj_bias: Tensor | None,
        gate_up_lora_a: Tensor | None,
        gate_up_lora_b: Tensor | None,
        down_lora_a: Tensor | None,
        down_lora_b: Tensor | None,
        keep_z: bool,
        *_static: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots, device = topk_ids.numel(), "cpu" if on_host else x.device
        return (
            x.new_empty(x.shape),
            x.new_empty(slots if keep_z else 0, gate_up_proj.shape[1]),
            topk_ids.new_empty(slots, dtype=torch.int64),
            torch.empty(gate_up_proj.shape[0] + 1, dtype=torch.int64, device=device),
        )

    @torch.library.custom_op(f"moe_ref::{name}_backward", mutates_args=())
    @_without_autocast
    def backward(
        dy: Tensor,
        z: Tensor,
        order: Tensor,
        group_offsets: Tensor,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_up_proj_bias: Tensor | None,
        down_proj_bias: Tensor | None,
        gate_up_lora_a: Tensor | None,
        gate_up_lora_b: Tensor | None,
        down_lora_a: Tensor | None,
        down_lora_b: Tensor | None,
        needs: list[bool],
        gate_up_scaling: float,
        down_scaling: float,
        scale_input: bool,
        activation: str,
        alpha: float,
        limit: float | None,
        up_offset: float,
        layout: str,
    ) -> list[Tensor]:
        dense = (gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias)
        factors = (gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
        layer = _make_layer(
            (x, topk_ids, topk_weights),
            order,
            dense,
            factors,
            (gate_up_scaling, down_scaling, scale_input, activation, alpha, limit, up_offset, layout),
        )
        multiply = products(group_offsets)
        if not z.shape[0]:  # nothing was kept: the same products give the same bits (D4)
            z = _layer.preactivations(layer, multiply)
        found = _layer.backward(layer, multiply, z, dy, dict(zip(NAMES, needs, strict=True)))
        owners = (x, topk_weights, *dense, *factors)
        return [
            found[name].to(owner.dtype).contiguous() if name in found and owner is not None else x.new_empty(0)
            for name, owner in zip(NAMES, owners, strict=True)
        ]

    @backward.register_fake
    def _(
        dy: Tensor,
        z: Tensor,
        order: Tensor,
        group_offsets: Tensor,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *parameters_and_static: Any,
    ) -> list[Tensor]:
        owners = (x, topk_weights, *parameters_and_static[: len(PARAMETERS)])
        needs = parameters_and_static[len(PARAMETERS)]
        return [
            torch.empty(owner.shape, dtype=owner.dtype, device=owner.device) if need else x.new_empty(0)
            for owner, need in zip(owners, needs, strict=True)
        ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, static = inputs[: 3 + len(PARAMETERS)], inputs[4 + len(PARAMETERS) :]
        _, *extra = output
        ctx.mark_non_differentiable(*extra)
        ctx.save_for_backward(*extra, *tensors)
        ctx.static = static

    def autograd(ctx: Any, dy: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, _, *others = ctx.needs_input_grad[: 3 + len(PARAMETERS)]
        needs = [of_x, *others]
        gradients = backward(dy, *ctx.saved_tensors, needs, *ctx.static)
        dx, *rest = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return dx, None, *rest, None, *(None for _ in ctx.static)

    def no_double_backward(_ctx: Any, *_gradients: Tensor) -> None:
        raise RuntimeError(f"{name}: double backward is not supported; differentiate with create_graph=False")

    forward.register_autograd(autograd, setup_context=setup_context)
    backward.register_autograd(no_double_backward)
    return Operator(forward, backward)


def apply(
    operator: Operator, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights, recompute: bool
) -> Tensor:
    """y, of x's shape, from x [..., H], topk_ids and topk_weights [T, K]."""
    rows = x.reshape(-1, x.shape[-1])
    arguments = arguments_of(rows, topk_ids, topk_weights, weights)
    needs_z = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    tensors, static = arguments[: 3 + len(PARAMETERS)], arguments[3 + len(PARAMETERS) :]
    y = operator.forward(*tensors, needs_z and not recompute, *static)[0]
    return y.reshape(x.shape)


def arguments_of(rows: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> tuple[Any, ...]:
    """The operator's arguments but for ``keep_z``: tensors first, then what is static."""
    config, lora, parameters = weights.config, weights.lora, weights.parameters()
    scalings = (1.0, 1.0) if lora is None else (float(lora.gate_up_scaling), float(lora.down_scaling))
    act = (config.activation, float(config.alpha), config.limit, float(config.up_offset), config.gate_up_layout)
    tensors = (rows, topk_ids, topk_weights, *(parameters.get(name) for name in PARAMETERS))
    return (*tensors, *scalings, config.scale_input, *act)


def _make_layer(
    routed: tuple[Tensor, Tensor, Tensor],
    order: Tensor,
    dense: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    factors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    static: tuple[float, float, bool, str, float, float | None, float, str],
) -> Layer:
    gate_up_scaling, down_scaling, scale_input = static[:3]
    up = Projection(dense[0], dense[2], factors[0], factors[1], gate_up_scaling)
    down = Projection(dense[1], dense[3], factors[2], factors[3], down_scaling)
    return Layer(*routed, order, up, down, Activation(*static[3:]), scale_input)


def _without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """The kernel in the dtypes it was given: autocast reaches into custom operators and would round products."""

    @functools.wraps(kernel)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(a for a in args if isinstance(a, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return plain
