"""Makes a custom operator of torch, with its backward, of an executor's way to compute the layer.

A projection reaches it as a tensor, a list of tensors and a list of integers (`executors._base.arguments`): a dense one
has no more than the tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from executors._base.arguments import flatten
from moe_ref.types import PARAMETERS, MoEWeights

P = ParamSpec("P")
R = TypeVar("R")

NAMES = ("x", "topk_weights", *PARAMETERS)  # what may need a gradient
TENSORS = 3 + len(PARAMETERS)  # arguments that are tensors, before the two lists of scales

FIRST = """
    Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj,
    Tensor? gate_up_proj_bias, Tensor? down_proj_bias, Tensor? gate_up_lora_a, Tensor? gate_up_lora_b,
    Tensor? down_lora_a, Tensor? down_lora_b, Tensor[] gate_up_scales, Tensor[] down_scales
"""
STATIC = """
    SymInt[] gate_up_format, SymInt[] down_format, float gate_up_scaling, float down_scaling, bool scale_input,
    str activation, float alpha, float? limit, float up_offset, str layout
"""
FORWARD = f"({FIRST}, bool keep_z, bool keep_decoded, {STATIC}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD = f"""(
    Tensor dy, Tensor z, Tensor order, Tensor group_offsets, Tensor decoded_gate_up, Tensor decoded_down,
    {FIRST}, bool[] needs, {STATIC}
) -> Tensor[]"""


class Arguments(NamedTuple):
    """A call's arguments, as the operator's schema has them.

    Attributes:
        x: [T, H].
        topk_ids, topk_weights: [T, K].
        gate_up_proj, down_proj: stacks [E, m, k], or codes in 4 bits.
        gate_up_proj_bias, down_proj_bias: [E, m].
        gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b: an adapter's factors, [E, r, k] and [E, m, r].
        gate_up_scales, down_scales: of projections in 4 bits.
        gate_up_format, down_format: of `executors._base.arguments`.
        gate_up_scaling, down_scaling: of adapters.
        scale_input, activation, alpha, limit, up_offset, layout: as in ``MoEConfig``.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None
    gate_up_lora_a: Tensor | None
    gate_up_lora_b: Tensor | None
    down_lora_a: Tensor | None
    down_lora_b: Tensor | None
    gate_up_scales: list[Tensor]
    down_scales: list[Tensor]
    gate_up_format: list[int]
    down_format: list[int]
    gate_up_scaling: float
    down_scaling: float
    scale_input: bool
    activation: str
    alpha: float
    limit: float | None
    up_offset: float
    layout: str

    def owners(self) -> dict[str, Tensor | None]:
        """What may need a gradient, by name."""
        return {name: getattr(self, name) for name in NAMES}


class Kept(NamedTuple):
    """What a forward pass hands to the backward pass, beside its arguments.

    Attributes:
        z: [S, J], or no rows if it is to be built anew.
        order: [S] the slot in each row.
        group_offsets: [E + 1], on the host for an implementation that wants them there.
        decoded_gate_up, decoded_down: of experts in 4 bits what was decoded, if it is kept; else empty.
    """

    z: Tensor
    order: Tensor
    group_offsets: Tensor
    decoded_gate_up: Tensor
    decoded_down: Tensor


class Implementation(Protocol):
    """A way to compute the layer."""

    @property
    def name(self) -> str:
        """Of the operator."""

    @property
    def gradient_format(self) -> torch.memory_format:
        """Whether parameters' gradients are contiguous, or have their owners' strides; others are contiguous."""

    def forward(self, given: Arguments, keep_z: bool, keep_decoded: bool) -> tuple[Tensor, Kept]:
        """y [T, H], and what a backward pass takes."""

    def fake(self, given: Arguments, keep_z: bool, keep_decoded: bool) -> tuple[Tensor, Kept]:
        """Tensors of the shapes, dtypes and devices that `forward` returns, without values."""

    def backward(self, given: Arguments, kept: Kept, dy: Tensor, needs: dict[str, bool]) -> dict[str, Tensor]:
        """The gradients of `NAMES` that are needed, by name, each of its owner's shape."""


class Operator(NamedTuple):
    """A custom operator and its backward.

    Attributes:
        forward: (y, *Kept).
        backward: the gradients of `NAMES`; an empty tensor for what is not needed.
    """

    forward: Any
    backward: Any


def define(implementation: Implementation) -> Operator:
    """Registers ``moe_ref::NAME`` and ``moe_ref::NAME_backward`` with torch."""
    name = implementation.name

    @torch.library.custom_op(f"moe_ref::{name}", mutates_args=(), schema=FORWARD)
    @_without_autocast
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        y, kept = implementation.forward(*_forward_arguments(inputs))
        return y, *kept

    @forward.register_fake
    def _(*inputs: Any) -> tuple[Tensor, ...]:
        y, kept = implementation.fake(*_forward_arguments(inputs))
        return y, *kept

    @torch.library.custom_op(f"moe_ref::{name}_backward", mutates_args=(), schema=BACKWARD)
    @_without_autocast
    def backward(*inputs: Any) -> list[Tensor]:
        dy, kept, given, needs = _backward_arguments(inputs)
        found = implementation.backward(given, kept, dy, needs)
        return [
            found[name].to(owner.dtype) if name in found and owner is not None else dy.new_empty(0)
            for name, owner in given.owners().items()
        ]

    @backward.register_fake
    def _(*inputs: Any) -> list[Tensor]:
        dy, _kept, given, needs = _backward_arguments(inputs)
        kinds = dict.fromkeys(PARAMETERS, implementation.gradient_format)
        return [
            torch.empty_like(owner, memory_format=kinds.get(name, torch.contiguous_format))
            if needs[name] and owner is not None
            else dy.new_empty(0)
            for name, owner in given.owners().items()
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


def _forward_arguments(inputs: tuple[Any, ...]) -> tuple[Arguments, bool, bool]:
    count = TENSORS + 2
    return Arguments(*inputs[:count], *inputs[count + 2 :]), *inputs[count : count + 2]


def _backward_arguments(inputs: tuple[Any, ...]) -> tuple[Tensor, Kept, Arguments, dict[str, bool]]:
    dy, inputs = inputs[0], inputs[1:]
    kept, inputs = Kept(*inputs[: len(Kept._fields)]), inputs[len(Kept._fields) :]
    count = TENSORS + 2
    needs = dict(zip(NAMES, inputs[count], strict=True))
    return dy, kept, Arguments(*inputs[:count], *inputs[count + 1 :]), needs


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

    For a backward pass it keeps z, and what else the implementation may keep, or leaves them to be built anew.
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
        flatten(projection) for projection in (weights.gate_up_proj, weights.down_proj)
    )
    parameters = weights.parameters() | {"gate_up_proj": gate_up, "down_proj": down}
    tensors = [rows, topk_ids, topk_weights, *(parameters.get(name) for name in PARAMETERS)]
    static = [gate_up_format, down_format, *scalings, config.scale_input, *act]
    return [*tensors, gate_up_scales, down_scales], static


def _without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """The kernel in the dtypes it was given: autocast reaches into custom operators and would round products."""

    @functools.wraps(kernel)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(a for a in args if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(first.device.type):
            return kernel(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return plain
