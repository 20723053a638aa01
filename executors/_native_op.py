"""The custom operator behind ``native``: forward, backward, and what tracing needs to know of them.

Roundings stand where clause E2 allows them: products in x's dtype; biases, activations and the combine in at least
fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from executors import _activation
from executors._activation import Activation

P = ParamSpec("P")
R = TypeVar("R")


def _without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """The kernel in the dtypes it was given: autocast reaches into custom operators and would round products."""

    @functools.wraps(kernel)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(a for a in args if isinstance(a, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return plain


@torch.library.custom_op("moe_ref::native", mutates_args=())
@_without_autocast
def forward(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    keep_z: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [T, H], z [S, 2I] in expert order or empty, order [S], group_offsets [E + 1] on the host)."""
    act = Activation(alpha, limit, up_offset, layout)
    num_experts, both, hidden = gate_up_proj.shape
    tokens, top_k = topk_ids.shape
    order, group_offsets = _group(topk_ids, num_experts)
    token_of = order // top_k
    outputs = x.new_zeros(tokens * top_k, hidden)
    kept = x.new_zeros(tokens * top_k if keep_z else 0, both)
    for expert, rows in _groups(group_offsets):
        z = linear(x[token_of[rows]], gate_up_proj[expert])
        if gate_up_proj_bias is not None:
            z = _add_bias(z, gate_up_proj_bias[expert])
        if keep_z:
            kept[rows] = z
        o = linear(_activation.forward(z, act), down_proj[expert])
        if down_proj_bias is not None:
            o = _add_bias(o, down_proj_bias[expert])
        outputs[order[rows]] = o
    y = _combine(outputs.view(tokens, top_k, hidden), _slot_weights(topk_ids, topk_weights, num_experts, x.dtype))
    return y, kept, order, group_offsets


@forward.register_fake
def _(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    keep_z: bool,
    *activation: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = topk_ids.numel()
    return (
        x.new_empty(x.shape),
        x.new_empty(slots if keep_z else 0, gate_up_proj.shape[1]),
        topk_ids.new_empty(slots, dtype=torch.int64),
        torch.empty(gate_up_proj.shape[0] + 1, dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("moe_ref::native_backward", mutates_args=())
@_without_autocast
def backward(
    dy: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    z: Tensor,
    order: Tensor,
    group_offsets: Tensor,
    needs: list[bool],
    alpha: float,
    limit: float | None,
    up_offset: float,
    layout: str,
) -> list[Tensor]:
    """Gradients of (x, topk_weights, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias).

    What ``needs`` does not ask for is an empty tensor and costs nothing.
    """
    act = Activation(alpha, limit, up_offset, layout)
    num_experts = gate_up_proj.shape[0]
    tokens, top_k = topk_ids.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    flat_weights = _slot_weights(topk_ids, topk_weights, num_experts, x.dtype).reshape(-1)
    parameters = (x, topk_weights, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias)
    need_x, need_weights, need_gate_up, need_down, need_gate_up_bias, need_down_bias = needs
    gradients = [_gradient(p, need) for p, need in zip(parameters, needs, strict=True)]
    _, d_topk_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias = gradients
    d_slot_weights = flat_weights.new_zeros(tokens * top_k if need_weights else 0)
    d_slots = x.new_zeros(tokens * top_k if need_x else 0, x.shape[1])
    need_dz = need_x or need_gate_up or need_gate_up_bias
    token_of = order // top_k

    for expert, rows in _groups(group_offsets):
        slots, tokens_here = order[rows], token_of[rows]
        upstream = dy[tokens_here]
        weight = flat_weights[slots, None]
        h = _activation.forward(z[rows], act) if need_down or need_weights else z[:0]
        if need_down or need_down_bias:
            weighted = weight * upstream.to(wide)
            if need_down_bias:
                d_down_bias[expert] = weighted.sum(0)
            if need_down:
                d_down[expert] = weighted.to(x.dtype).t() @ h
        if not (need_dz or need_weights):
            continue
        dh = (upstream @ down_proj[expert]).to(wide)
        if need_weights:  # <dy, o> without keeping o: <W_d^T dy, h> + <dy, b_d>, with dy unweighted (D3)
            d_weight = (dh * h.to(wide)).sum(1)
            if down_proj_bias is not None:
                d_weight = d_weight + (upstream.to(wide) * down_proj_bias[expert].to(wide)).sum(1)
            d_slot_weights[slots] = d_weight
        if not need_dz:
            continue
        dz = _activation.backward(z[rows], weight * dh, act)
        if need_gate_up_bias:
            d_gate_up_bias[expert] = dz.sum(0)
        dz = dz.to(x.dtype)
        if need_gate_up:
            d_gate_up[expert] = dz.t() @ x[tokens_here]
        if need_x:
            d_slots[slots] = dz @ gate_up_proj[expert]

    if need_x:
        gradients[0] = _sum_slots(d_slots.view(tokens, top_k, x.shape[1])).to(x.dtype)
    if need_weights:
        d_topk_weights.copy_(d_slot_weights.view(tokens, top_k))
    return gradients


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    z: Tensor,
    order: Tensor,
    group_offsets: Tensor,
    needs: list[bool],
    *activation: Any,
) -> list[Tensor]:
    parameters = (x, topk_weights, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias)
    return [_gradient(p, need) for p, need in zip(parameters, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _keep_z, alpha, limit, up_offset, layout = inputs
    _, z, order, group_offsets = output
    ctx.mark_non_differentiable(z, order, group_offsets)
    ctx.save_for_backward(*tensors, z, order, group_offsets)
    ctx.activation = (alpha, limit, up_offset, layout)


def _autograd(ctx: Any, dy: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, topk_ids, *rest = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[0], *needed[2:7]]
    gradients = backward(dy, x, topk_ids, *rest, needs, *ctx.activation)
    dx, *others = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return dx, None, *others, None, None, None, None, None


def _no_double_backward(ctx: Any, *_gradients: Tensor) -> None:
    raise RuntimeError("native: double backward is not supported; differentiate with create_graph=False")


forward.register_autograd(_autograd, setup_context=_setup_context)
backward.register_autograd(_no_double_backward)


def _group(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots stably sorted by expert, empty slots last (G1, R7), and the group offsets on the host."""
    ids = topk_ids.reshape(-1)
    ids = ids.masked_fill((ids < 0) | (ids > num_experts), num_experts)
    sorted_ids, order = torch.sort(ids, stable=True)
    edges = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(sorted_ids, edges).cpu()  # the one host synchronisation


def _groups(group_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with the rows it has."""
    offsets = group_offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(offsets)):
        if start < stop:
            yield expert, slice(start, stop)


def _slot_weights(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Weights in at least fp32 (R6), zero for empty slots whatever stands there (R7)."""
    wide = torch.promote_types(dtype, torch.float32)
    return topk_weights.to(wide).masked_fill((topk_ids < 0) | (topk_ids >= num_experts), 0.0)


def _add_bias(product: Tensor, bias: Tensor) -> Tensor:
    wide = torch.promote_types(product.dtype, torch.float32)
    return (product.to(wide) + bias.to(wide)).to(product.dtype)


def _combine(outputs: Tensor, slot_weights: Tensor) -> Tensor:
    """Sum over k in increasing order, rounded once (C1)."""
    total = torch.zeros(outputs.shape[::2], dtype=slot_weights.dtype, device=outputs.device)
    for k in range(outputs.shape[1]):
        total += slot_weights[:, k, None] * outputs[:, k]
    return total.to(outputs.dtype)


def _sum_slots(slots: Tensor) -> Tensor:
    """Sum over k in increasing order, in at least fp32."""
    total = slots[:, 0].to(torch.promote_types(slots.dtype, torch.float32))
    for k in range(1, slots.shape[1]):
        total = total + slots[:, k]
    return total


def _gradient(parameter: Tensor | None, need: bool) -> Tensor:
    """Zeros for a gradient to be filled, so that an expert without tokens has exactly zero (D2); else nothing."""
    if parameter is None or not need:
        return torch.empty(0)
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
