"""Makes a custom operator of torch, with its backward, of an executor's way to compute the layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from executors._base import flops, transforms
from executors._base.arguments import NAMES as NAMES
from executors._base.arguments import TENSORS, Arguments, arguments_of
from moe_ref.types import PARAMETERS, MoEWeights

P = ParamSpec("P")
R = TypeVar("R")

ARGUMENTS = """
    Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj,
    Tensor? gate_up_proj_bias, Tensor? down_proj_bias, Tensor? gate_up_lora_a, Tensor? gate_up_lora_b,
    Tensor? down_lora_a, Tensor? down_lora_b, Tensor? post_expert_norm, Tensor[] gate_up_scales, Tensor[] down_scales,
    SymInt[] gate_up_format, SymInt[] down_format, float gate_up_scaling, float down_scaling, bool scale_input,
    str activation, float alpha, float? limit, float up_offset, str layout,
    str clamp, float? gate_softcap, float? up_softcap, float post_expert_norm_eps
"""
FORWARD = f"({ARGUMENTS}, bool keep_z, bool keep_decoded) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD = f"""(
    Tensor dy, Tensor z, Tensor order, Tensor group_offsets, Tensor decoded_gate_up, Tensor decoded_down,
    bool[] needs, {ARGUMENTS}
) -> Tensor[]"""
TANGENT = f"({', '.join(f'Tensor? d_{name}' for name in NAMES)}, {ARGUMENTS}) -> Tensor"


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

    def tangent(self, given: Arguments, tangents: dict[str, Tensor]) -> Tensor:
        """The tangent of y [T, H], from those of `NAMES` that are there, each of its owner's shape and dtype."""


class Operator(NamedTuple):
    """A custom operator and its backward.

    Attributes:
        forward: (y, *Kept).
        backward: the gradients of `NAMES`; an empty tensor for what is not needed.
        tangent: of y, from the tangents of `NAMES`, or None for what has none, and the arguments.
    """

    forward: Any
    backward: Any
    tangent: Any


def define(implementation: Implementation) -> Operator:
    """Registers ``moe_ref::NAME``, ``moe_ref::NAME_backward`` and ``moe_ref::NAME_tangent`` with torch."""
    name = implementation.name

    @torch.library.custom_op(f"moe_ref::{name}", mutates_args=(), schema=FORWARD)
    @_without_autocast
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *given, keep_z, keep_decoded = inputs
        y, kept = implementation.forward(Arguments(*given), keep_z, keep_decoded)
        return y, *kept

    @forward.register_fake
    def _(*inputs: Any) -> tuple[Tensor, ...]:
        *given, keep_z, keep_decoded = inputs
        y, kept = implementation.fake(Arguments(*given), keep_z, keep_decoded)
        return y, *kept

    @torch.library.custom_op(f"moe_ref::{name}_backward", mutates_args=(), schema=BACKWARD)
    @_without_autocast
    def backward(dy: Tensor, *inputs: Any) -> list[Tensor]:
        kept, needs, given = _backward_arguments(inputs)
        found = implementation.backward(given, kept, dy, needs)
        return [
            found[name].to(owner.dtype) if name in found and owner is not None else dy.new_empty(0)
            for name, owner in owners_of(given).items()
        ]

    @backward.register_fake
    def _(dy: Tensor, *inputs: Any) -> list[Tensor]:
        _kept, needs, given = _backward_arguments(inputs)
        kinds = dict.fromkeys(PARAMETERS, implementation.gradient_format)
        return [
            torch.empty_like(owner, memory_format=kinds.get(name, torch.contiguous_format))
            if needs[name] and owner is not None
            else dy.new_empty(0)
            for name, owner in owners_of(given).items()
        ]

    @torch.library.custom_op(f"moe_ref::{name}_tangent", mutates_args=(), schema=TANGENT)
    @_without_autocast
    def tangent(*inputs: Any) -> Tensor:
        of_names, given = inputs[: len(NAMES)], Arguments(*inputs[len(NAMES) :])
        tangents = {name: own for name, own in zip(NAMES, of_names, strict=True) if own is not None}
        return implementation.tangent(given, tangents)

    @tangent.register_fake
    def _(*inputs: Any) -> Tensor:
        return torch.empty_like(inputs[len(NAMES)], memory_format=torch.contiguous_format)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (*inputs_of_layer, _keep_z, _keep_decoded), (_y, *kept) = inputs, output
        given = Arguments(*inputs_of_layer)
        tensors = given.tensors()
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # it would make zeros as large as z in each backward pass
        ctx.save_for_backward(*kept, *tensors)
        ctx.given = given.with_tensors([None] * len(tensors))

    def autograd(ctx: Any, dy: Tensor, *_unused: Tensor | None) -> tuple[Any, ...]:
        asked = dict(zip(Arguments._fields[:TENSORS], ctx.needs_input_grad, strict=False))
        needs = [asked[name] for name in NAMES]
        saved = ctx.saved_tensors  # read once: hooks may allow no second time
        kept, given = saved[: len(Kept._fields)], ctx.given.with_tensors(saved[len(Kept._fields) :])
        found = dict(zip(NAMES, backward(dy, *kept, needs, *given), strict=True))
        lists = {name: [None] * len(getattr(given, name)) for name in ("gate_up_scales", "down_scales")}
        gradients = {name: found[name] for name in NAMES if asked[name]} | lists
        return *(gradients.get(name) for name in Arguments._fields), None, None

    def no_double_backward(_ctx: Any, *_gradients: Tensor) -> None:
        raise RuntimeError(f"{name}: double backward is not supported; differentiate with create_graph=False")

    forward.register_autograd(autograd, setup_context=setup_context)
    backward.register_autograd(no_double_backward)
    flops.register(name)
    return Operator(forward, backward, tangent)


def owners_of(given: Arguments) -> dict[str, Tensor | None]:
    """What may need a gradient, by name."""
    return {name: getattr(given, name) for name in NAMES}


def _backward_arguments(inputs: tuple[Any, ...]) -> tuple[Kept, dict[str, bool], Arguments]:
    count = len(Kept._fields)
    needs = dict(zip(NAMES, inputs[count], strict=True))
    return Kept(*inputs[:count]), needs, Arguments(*inputs[count + 1 :])


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
    given = arguments_of(rows, topk_ids, topk_weights, weights)
    if transforms.are_active():
        return transforms.layer(operator, given).view(x.shape)
    training = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in owners_of(given).values())
    y: Tensor = operator.forward(*given, training and keep_z, training and keep_decoded)[0]
    # No view, although its memory is y's own: what is added to it in place would lose the hooks of FSDP2.
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, x.shape)


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
