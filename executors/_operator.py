"""Makes a custom operator, with its backward, of `executors._layer` and a way to multiply.

A projection reaches it as a tensor, a list of tensors and a list of integers (`executors._format`): a dense one has no
more than the tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from executors import _layer
from executors._activation import Activation
from executors._format import Parts, apart, packed_of
from executors._grouping import group
from executors._layer import Layer, Matrices, Products, Projection
from executors._stack import Stack, room_for
from moe_ref.types import PARAMETERS, MoEWeights

P = ParamSpec("P")
R = TypeVar("R")

NAMES = ("x", "topk_weights", *PARAMETERS)  # what may need a gradient
TENSORS = 3 + len(PARAMETERS)  # arguments that are tensors, before the two lists of scales


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
        forward: (y, z or nothing, order, group offsets, and of both projections what was decoded, or nothing).
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
        gate_up_scales: list[Tensor],
        down_scales: list[Tensor],
        keep_z: bool,
        keep_decoded: bool,
        gate_up_format: list[int],
        down_format: list[int],
        gate_up_scaling: float,
        down_scaling: float,
        scale_input: bool,
        activation: str,
        alpha: float,
        limit: float | None,
        up_offset: float,
        layout: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        parts = (gate_up_proj, gate_up_scales, gate_up_format), (down_proj, down_scales, down_format)
        up_room, down_room = (room_for(packed_of(p, x), topk_ids.numel() if keep_decoded else 0, x) for p in parts)
        matrices = _matrices(parts[0], x, up_room, False), _matrices(parts[1], x, down_room, False)
        order, group_offsets = group(topk_ids, matrices[0].shape[0])
        kept = group_offsets.cpu() if on_host else group_offsets
        layer = _make_layer(
            (x, topk_ids, topk_weights),
            order,
            (*matrices, gate_up_proj_bias, down_proj_bias),
            (gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b),
            (gate_up_scaling, down_scaling, scale_input, activation, alpha, limit, up_offset, layout),
        )
        y, z = _layer.forward(layer, products(kept))
        return y, z if keep_z else z.new_empty(0, z.shape[1]), order, kept, up_room, down_room

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
        gate_up_scales: list[Tensor],
        down_scales: list[Tensor],
        keep_z: bool,
        keep_decoded: bool,
        gate_up_format: list[int],
        down_format: list[int],
        *_static: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        slots, device = topk_ids.numel(), "cpu" if on_host else x.device
        parts = (gate_up_proj, gate_up_scales, gate_up_format), (down_proj, down_scales, down_format)
        packed = [packed_of(p, x) for p in parts]
        experts, both = (packed[0] or gate_up_proj).shape[:2]
        return (
            x.new_empty(x.shape),
            x.new_empty(slots if keep_z else 0, both),
            topk_ids.new_empty(slots, dtype=torch.int64),
            torch.empty(experts + 1, dtype=torch.int64, device=device),
            room_for(packed[0], slots if keep_decoded else 0, x),
            room_for(packed[1], slots if keep_decoded else 0, x),
        )

    @torch.library.custom_op(f"moe_ref::{name}_backward", mutates_args=())
    @_without_autocast
    def backward(
        dy: Tensor,
        z: Tensor,
        order: Tensor,
        group_offsets: Tensor,
        gate_up_decoded: Tensor,
        down_decoded: Tensor,
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
        gate_up_scales: list[Tensor],
        down_scales: list[Tensor],
        needs: list[bool],
        gate_up_format: list[int],
        down_format: list[int],
        gate_up_scaling: float,
        down_scaling: float,
        scale_input: bool,
        activation: str,
        alpha: float,
        limit: float | None,
        up_offset: float,
        layout: str,
    ) -> list[Tensor]:
        gate_up = _matrices((gate_up_proj, gate_up_scales, gate_up_format), x, gate_up_decoded, True)
        down = _matrices((down_proj, down_scales, down_format), x, down_decoded, True)
        factors = (gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
        layer = _make_layer(
            (x, topk_ids, topk_weights),
            order,
            (gate_up, down, gate_up_proj_bias, down_proj_bias),
            factors,
            (gate_up_scaling, down_scaling, scale_input, activation, alpha, limit, up_offset, layout),
        )
        multiply = products(group_offsets)
        if not z.shape[0]:  # nothing was kept: the same products give the same bits (D4)
            z = _layer.preactivations(layer, multiply)
        found = _layer.backward(layer, multiply, z, dy, dict(zip(NAMES, needs, strict=True)))
        owners = (x, topk_weights, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias, *factors)
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
        gate_up_decoded: Tensor,
        down_decoded: Tensor,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *others: Any,
    ) -> list[Tensor]:
        owners = (x, topk_weights, *others[: len(PARAMETERS)])
        needs = others[len(PARAMETERS) + 2]
        return [
            torch.empty(owner.shape, dtype=owner.dtype, device=owner.device) if need else x.new_empty(0)
            for owner, need in zip(owners, needs, strict=True)
        ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, lists, static = inputs[:TENSORS], inputs[TENSORS : TENSORS + 2], inputs[TENSORS + 4 :]
        _, *extra = output
        ctx.mark_non_differentiable(*extra)
        ctx.save_for_backward(*extra, *tensors, *lists[0], *lists[1])
        ctx.lengths = [len(tensors) for tensors in lists]
        ctx.static = static

    def autograd(ctx: Any, dy: Tensor, *_unused: Tensor | None) -> tuple[Any, ...]:
        of_x, _, *others = ctx.needs_input_grad[:TENSORS]
        needs = [of_x, *others]
        saved, (first, second) = ctx.saved_tensors, ctx.lengths
        tensors, scales = saved[: len(saved) - first - second], saved[len(saved) - first - second :]
        gradients = backward(dy, *tensors, list(scales[:first]), list(scales[first:]), needs, *ctx.static)
        dx, *rest = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return dx, None, *rest, [None] * first, [None] * second, None, None, *(None for _ in ctx.static)

    def no_double_backward(_ctx: Any, *_gradients: Tensor) -> None:
        raise RuntimeError(f"{name}: double backward is not supported; differentiate with create_graph=False")

    forward.register_autograd(autograd, setup_context=setup_context)
    backward.register_autograd(no_double_backward)
    return Operator(forward, backward)


def apply(
    operator: Operator,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: MoEWeights,
    *,
    keep_z: bool,
    keep_decoded: bool = False,
) -> Tensor:
    """y, of x's shape, from x [..., H], topk_ids and topk_weights [T, K].

    For a backward pass it keeps z, and what was decoded, or leaves them to be built anew.
    """
    rows = x.reshape(-1, x.shape[-1])
    tensors, static = arguments_of(rows, topk_ids, topk_weights, weights)
    training = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in tensors)
    y = operator.forward(*tensors, training and keep_z, training and keep_decoded, *static)[0]
    return y.reshape(x.shape)


def arguments_of(
    rows: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights
) -> tuple[list[Any], list[Any]]:
    """The operator's arguments without what to keep: before it tensors and lists of them, after it what is static."""
    config, lora = weights.config, weights.lora
    scalings = (1.0, 1.0) if lora is None else (float(lora.gate_up_scaling), float(lora.down_scaling))
    act = (config.activation, float(config.alpha), config.limit, float(config.up_offset), config.gate_up_layout)
    (gate_up, gate_up_scales, gate_up_format), (down, down_scales, down_format) = (
        apart(projection) for projection in (weights.gate_up_proj, weights.down_proj)
    )
    parameters = weights.parameters() | {"gate_up_proj": gate_up, "down_proj": down}
    tensors = [rows, topk_ids, topk_weights, *(parameters.get(name) for name in PARAMETERS)]
    static = [gate_up_format, down_format, *scalings, config.scale_input, *act]
    return [*tensors, gate_up_scales, down_scales], static


def _matrices(parts: Parts, x: Tensor, decoded: Tensor, filled: bool) -> Matrices:
    """What products take: a dense stack as it is, or one in 4 bits with the room for what is decoded of it."""
    packed = packed_of(parts, x)
    return parts[0] if packed is None else Stack(packed, decoded, filled and decoded.shape[0] > 0)


def _make_layer(
    routed: tuple[Tensor, Tensor, Tensor],
    order: Tensor,
    projections: tuple[Any, ...],
    factors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    static: tuple[float, float, bool, str, float, float | None, float, str],
) -> Layer:
    gate_up_scaling, down_scaling, scale_input = static[:3]
    up = Projection(projections[0], projections[2], factors[0], factors[1], gate_up_scaling)
    down = Projection(projections[1], projections[3], factors[2], factors[3], down_scaling)
    return Layer(*routed, order, up, down, Activation(*static[3:]), scale_input)


def _without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """The kernel in the dtypes it was given: autocast reaches into custom operators and would round products."""

    @functools.wraps(kernel)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(a for a in args if isinstance(a, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return plain
