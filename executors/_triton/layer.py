"""The layer, forward and backward, as launches of kernels (clauses E1 to E6, C1, C3, D1 to D4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors._base.arguments import Activation, Projection
from executors._triton.launch import gradients as _gradients
from executors._triton.launch import products
from executors._triton.launch.narrow import Narrow, between, by_columns, by_rows
from executors._triton.launch.operands import Adapter, LaunchPlan, Matrices
from moe_ref.types import PARAMETERS

NONE = Activation("", 1.0, None, 0.0, "")  # no activation


class Layer(NamedTuple):
    """Everything that a forward and a backward pass share.

    Attributes:
        x: [T, H].
        topk_ids, topk_weights: [T, K], contiguous.
        up, down: the projections.
        act: the activation.
        scale_input: C3.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    up: Projection[Matrices]
    down: Projection[Matrices]
    act: Activation
    scale_input: bool

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.matrices.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of x."""
        return self.x.dtype

    @property
    def before(self) -> Tensor | None:
        """Weights of the slots that multiply the experts' input (C3)."""
        return self.topk_weights if self.scale_input else None

    @property
    def before_narrowing(self) -> Tensor | None:
        """Those weights where dz takes them, in fp32, for the gradients of matrices."""
        return self.before if between(self.dtype) != self.dtype else None

    @property
    def before_outer(self) -> Tensor | None:
        """Those weights where rows of x take them there."""
        return None if between(self.dtype) != self.dtype else self.before

    @property
    def after(self) -> Tensor | None:
        """Weights of the slots that multiply the experts' output."""
        return None if self.scale_input else self.topk_weights


def forward(layer: Layer, plan: LaunchPlan, keep_z: bool) -> tuple[Tensor, Tensor]:
    """y [T, H], and z [S, J] or no rows of it."""
    h, z = activations(layer, plan, keep_z)
    down = layer.down
    rows = by_rows(h, layer.dtype, plan)
    del h
    adapter = adapter_of(rows, down, plan, of_tokens=False)
    slots = products.down(rows, down.matrices, down.bias, adapter, layer.after, plan.config.down, plan)
    return products.combine(slots, layer.dtype, layer.topk_ids, layer.num_experts), z


def activations(layer: Layer, plan: LaunchPlan, keep_z: bool) -> tuple[Tensor, Tensor]:
    """h [S, I], and z [S, J] or no rows of it; in fp32 where x is in fp16 (E7)."""
    up = layer.up
    adapter = adapter_of(Narrow(layer.x), up, plan, of_tokens=True)
    return products.up(layer.x, up.matrices, up.bias, adapter, layer.before, layer.act, plan.config.up, plan, keep_z)


def backward(layer: Layer, plan: LaunchPlan, z: Tensor, dy: Tensor, needs: dict[str, bool]) -> dict[str, Tensor]:
    """Gradients of whatever ``needs`` asks for, by name; what nobody asks for costs nothing.

    Args:
        layer: as for `forward`.
        plan: as for `forward`.
        z: [S, J] from `forward`, or no rows: then it is built anew, to the same bits (D4).
        dy: [T, H] the upstream gradient.
        needs: for "x", "topk_weights" and the names of parameters, whether a gradient is wanted.
    """
    found: dict[str, Tensor] = {}
    up, down, scale_input = layer.up, layer.down, layer.scale_input
    of_down = [needs[name] for name in ("down_proj", "down_lora_a", "down_lora_b")]
    of_up = [needs[name] for name in needs if name.startswith("gate_up")]
    want_weights = needs["topk_weights"] and not scale_input
    want_rows = needs["x"] or (needs["topk_weights"] and scale_input)
    want_dz = want_rows or any(of_up)

    if needs["down_proj_bias"] and down.bias is not None:
        found["down_proj_bias"] = _gradients.sums(dy, layer.after, down.bias, plan, of_tokens=True)
    if not (want_dz or want_weights or any(of_down)):
        return found
    if not z.shape[0]:
        _, z = activations(layer, plan, keep_z=True)

    # Of the down projection: dh, from dy without its weight, and from it what stands before the activation.
    want_dh = want_dz or want_weights
    d_inner = dh = None
    if down.lora_b is not None and (want_dh or needs["down_lora_a"]):
        d_inner = inner_gradient(Narrow(dy), down, plan, of_tokens=True)
    if want_dh:
        dh = activation_gradient(layer, plan, dy, d_inner)
    dz, h, d_weights = preactivation_gradient(
        layer, plan, dh, z, dy, want_dz=want_dz, want_h=any(of_down), want_weights=want_weights
    )
    del z, dh
    if want_weights:
        found["topk_weights"] = d_weights
    found |= down_gradients(layer, plan, h, dy, d_inner, needs)
    del h, d_inner

    # Of the up projection.
    if needs["gate_up_proj_bias"] and up.bias is not None:
        found["gate_up_proj_bias"] = _gradients.sums(dz, None, up.bias, plan, of_tokens=False)
    if not (want_rows or any(of_up)):
        return found
    rows = by_rows(dz, layer.dtype, plan)
    d_inner = None
    if up.lora_b is not None and (want_rows or needs["gate_up_lora_a"]):
        d_inner = inner_gradient(rows, up, plan, of_tokens=False)
    found |= up_gradients(layer, plan, dz, d_inner, needs)
    del dz
    if want_rows:
        slots = input_gradient(layer, plan, rows, d_inner)
        if needs["topk_weights"] and scale_input:
            found["topk_weights"] = _gradients.input_weights(
                slots, layer.x, layer.topk_ids, layer.topk_weights, layer.num_experts
            )
        if needs["x"]:
            found["x"] = products.combine(slots, layer.dtype, layer.topk_ids, layer.num_experts, layer.before)
    return found


def activation_gradient(layer: Layer, plan: LaunchPlan, dy: Tensor, d_inner: Tensor | None) -> Tensor:
    """dh [S, I] from dy [T, H] without the weights of slots, and from the gradient between the adapter's factors."""
    down, tile = layer.down, plan.config.dh
    transposed, adapter = down.matrices.transpose(1, 2), _back(d_inner, down, layer, plan)
    return products.up(dy, transposed, None, adapter, None, NONE, tile, plan, keep_z=False)[0]


def preactivation_gradient(
    layer: Layer,
    plan: LaunchPlan,
    dh: Tensor | None,
    z: Tensor,
    dy: Tensor,
    *,
    want_dz: bool = True,
    want_h: bool = True,
    want_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [S, J], h [S, I], and the gradient of the weights [T, K]; what is not wanted has no rows."""
    weighted, bias, act = not layer.scale_input, layer.down.bias, layer.act
    wanted = {"want_dz": want_dz, "want_h": want_h, "want_weights": want_weights}
    return _gradients.dz(dh, z, layer.topk_weights, weighted, dy, bias, act, plan, **wanted)


def input_gradient(layer: Layer, plan: LaunchPlan, dz: Narrow, d_inner: Tensor | None) -> Tensor:
    """[S, H] The gradient of the experts' input, from dz [S, J] and the gradient between the adapter's factors."""
    up, tile = layer.up, plan.config.dx
    return products.down(dz, up.matrices.transpose(1, 2), None, _back(d_inner, up, layer, plan), None, tile, plan)


def down_gradients(
    layer: Layer, plan: LaunchPlan, h: Tensor, dy: Tensor, d_inner: Tensor | None, needs: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients of the down projection and its adapter, from h with its weight, and dy without."""
    found: dict[str, Tensor] = {}
    down, upstream = layer.down, Narrow(dy)
    of_h = by_columns(h, layer.dtype, plan) if needs["down_proj"] or needs["down_lora_a"] else None
    if needs["down_proj"] and of_h is not None and isinstance(down.matrices, Tensor):
        found["down_proj"] = _gradients.outer(upstream, of_h, down.matrices, plan, tokens_a=True)
    if needs["down_lora_a"] and of_h is not None and d_inner is not None and down.lora_a is not None:
        found["down_lora_a"] = _gradients.outer(by_columns(d_inner, layer.dtype, plan), of_h, down.lora_a, plan)
    if needs["down_lora_b"] and down.lora_a is not None and down.lora_b is not None:
        rows = by_rows(h, layer.dtype, plan)
        inner = products.inner(rows, down.lora_a, down.scaling, plan, of_tokens=False)
        of_inner = by_columns(inner, layer.dtype, plan)
        found["down_lora_b"] = _gradients.outer(upstream, of_inner, down.lora_b, plan, tokens_a=True)
    return found


def up_gradients(
    layer: Layer, plan: LaunchPlan, dz: Tensor, d_inner: Tensor | None, needs: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients of the up projection and its adapter."""
    found: dict[str, Tensor] = {}
    up, x, dtype = layer.up, Narrow(layer.x), layer.dtype
    early, late = layer.before_narrowing, layer.before_outer
    wanted = needs["gate_up_proj"] or needs["gate_up_lora_b"]
    of_dz = by_columns(dz, dtype, plan, early) if wanted else None
    if needs["gate_up_proj"] and of_dz is not None and isinstance(up.matrices, Tensor):
        found["gate_up_proj"] = _gradients.outer(of_dz, x, up.matrices, plan, tokens_b=True, scaled_b=late)
    if needs["gate_up_lora_a"] and d_inner is not None and up.lora_a is not None:
        of_inner = by_columns(d_inner, dtype, plan, early)
        found["gate_up_lora_a"] = _gradients.outer(of_inner, x, up.lora_a, plan, tokens_b=True, scaled_b=late)
    if needs["gate_up_lora_b"] and of_dz is not None and up.lora_a is not None and up.lora_b is not None:
        inner = products.inner(x, up.lora_a, up.scaling, plan, of_tokens=True)
        found["gate_up_lora_b"] = _gradients.outer(
            of_dz, by_columns(inner, dtype, plan), up.lora_b, plan, scaled_b=late
        )
    return found


def zeros(owners: dict[str, Tensor | None], needs: dict[str, bool]) -> dict[str, Tensor]:
    """The gradients where there are no slots at all: 0 for parameters, and of x and weights there are none."""
    return {
        name: torch.zeros_like(owner)
        if name in PARAMETERS
        else torch.zeros(owner.shape, dtype=owner.dtype, device=owner.device)
        for name, owner in owners.items()
        if needs[name] and owner is not None
    }


def adapter_of(rows: Narrow, projection: Projection[Matrices], plan: LaunchPlan, *, of_tokens: bool) -> Adapter | None:
    """An adapter's part of rows W^T."""
    if projection.lora_a is None or projection.lora_b is None:
        return None
    inner = products.inner(rows, projection.lora_a, projection.scaling, plan, of_tokens=of_tokens)
    return Adapter(*by_rows(inner, rows.values.dtype, plan), projection.lora_b)


def inner_gradient(d_out: Narrow, projection: Projection[Matrices], plan: LaunchPlan, *, of_tokens: bool) -> Tensor:
    """[S, r] The gradient of rows A^T."""
    assert projection.lora_b is not None
    return products.inner(d_out, projection.lora_b.transpose(1, 2), projection.scaling, plan, of_tokens=of_tokens)


def _back(d_inner: Tensor | None, projection: Projection[Matrices], layer: Layer, plan: LaunchPlan) -> Adapter | None:
    """An adapter's part of d_out W."""
    if d_inner is None or projection.lora_a is None:
        return None
    return Adapter(*by_rows(d_inner, layer.dtype, plan), projection.lora_a.transpose(1, 2))
