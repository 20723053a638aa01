"""The tangent of y: how it changes with the layer's inputs and parameters, in the first order (forward mode).

The kernels of the layer make it, a launch for each product. A term that has no tangent of rows has zeros there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from executors._base.arguments import Projection
from executors._triton.launch import products
from executors._triton.launch.narrow import Narrow, between, by_rows
from executors._triton.launch.operands import Adapter, LaunchPlan, Matrices, readable
from executors._triton.layer import NONE, Layer, activations, adapter_of, preactivation_gradient


def tangent(layer: Layer, plan: LaunchPlan, tangents: dict[str, Tensor]) -> Tensor:
    """[T, H] The tangent of y, in x's dtype.

    Args:
        layer: as for `executors._triton.layer.forward`.
        plan: as there.
        tangents: of "x", "topk_weights" and parameters, those that there are.
    """
    d_weights = tangents.get("topk_weights")
    d_weights = None if d_weights is None else d_weights.contiguous()
    h, z = activations(layer, plan, keep_z=True)
    dz = _up_tangent(layer, plan, tangents, d_weights)
    dh = None if dz is None else _slopes_times(z, dz, layer, plan)
    del z, dz
    total = _down_tangent(h, dh, layer, plan, tangents)
    if d_weights is not None and not layer.scale_input:
        down = layer.down
        rows = by_rows(h, layer.dtype, plan)
        adapter = adapter_of(rows, down, plan, of_tokens=False)
        weighted = products.down(rows, down.matrices, down.bias, adapter, d_weights, plan.config.down, plan)
        total = weighted if total is None else total.add_(weighted)
    if total is None:
        return torch.zeros(layer.x.shape, dtype=layer.dtype, device=layer.x.device)
    return products.combine(total, layer.dtype, layer.topk_ids, layer.num_experts)


def _up_tangent(layer: Layer, plan: LaunchPlan, tangents: dict[str, Tensor], d_weights: Tensor | None) -> Tensor | None:
    """[S, J] The tangent of z, or None without tangents."""
    up, x, tile = layer.up, layer.x, plan.config.dh  # tiles for products without an activation
    dx, d_matrices, d_bias = (tangents.get(name) for name in ("x", "gate_up_proj", "gate_up_proj_bias"))
    d_up = up._replace(lora_a=tangents.get("gate_up_lora_a"), lora_b=tangents.get("gate_up_lora_b"))
    terms = []
    if dx is not None or d_bias is not None or d_up.lora_a is not None or d_up.lora_b is not None:
        rows = torch.zeros_like(x) if dx is None else readable(dx, plan.aligned)
        adapter = _adapter_tangent(Narrow(x), None if dx is None else Narrow(rows), up, d_up, plan, of_tokens=True)
        terms.append(products.up(rows, up.matrices, d_bias, adapter, layer.before, NONE, tile, plan, False)[0])
    if d_matrices is not None:
        matrices = _like(up.matrices, d_matrices)
        terms.append(products.up(x, matrices, None, None, layer.before, NONE, tile, plan, False)[0])
    if d_weights is not None and layer.scale_input:
        adapter = adapter_of(Narrow(x), up, plan, of_tokens=True)
        terms.append(products.up(x, up.matrices, None, adapter, d_weights, NONE, tile, plan, False)[0])
    return _sum(terms)


def _slopes_times(z: Tensor, dz: Tensor, layer: Layer, plan: LaunchPlan) -> Tensor:
    """[S, I] The tangent of h: dz times the slopes of the activation, which its backward kernel gives for ones."""
    gated = bool(layer.act.layout)
    ones = torch.ones(z.shape[0], z.shape[1] // (2 if gated else 1), dtype=z.dtype, device=z.device)
    unweighted = layer._replace(scale_input=True)
    slopes = preactivation_gradient(unweighted, plan, ones, z, layer.x, want_h=False)[0]
    terms = slopes.float() * dz
    if gated:
        halves = (terms[:, 0::2], terms[:, 1::2]) if layer.act.layout == "interleaved" else terms.chunk(2, dim=1)
        terms = halves[0] + halves[1]
    return terms.to(between(layer.dtype))


def _down_tangent(
    h: Tensor, dh: Tensor | None, layer: Layer, plan: LaunchPlan, tangents: dict[str, Tensor]
) -> Tensor | None:
    """[S, H] The tangent of the slots' outputs, with their weights, each at its slot; None without tangents."""
    down, tile = layer.down, plan.config.down
    d_matrices, d_bias = tangents.get("down_proj"), tangents.get("down_proj_bias")
    d_down = down._replace(lora_a=tangents.get("down_lora_a"), lora_b=tangents.get("down_lora_b"))
    rows = by_rows(h, layer.dtype, plan)
    terms = []
    if dh is not None or d_bias is not None or d_down.lora_a is not None or d_down.lora_b is not None:
        d_rows = by_rows(torch.zeros_like(h) if dh is None else dh, layer.dtype, plan)
        adapter = _adapter_tangent(rows, None if dh is None else d_rows, down, d_down, plan, of_tokens=False)
        terms.append(products.down(d_rows, down.matrices, d_bias, adapter, layer.after, tile, plan))
    if d_matrices is not None:
        matrices = _like(down.matrices, d_matrices)
        terms.append(products.down(rows, matrices, None, None, layer.after, tile, plan))
    return _sum(terms)


def _adapter_tangent(
    rows: Narrow,
    d_rows: Narrow | None,
    own: Projection[Matrices],
    tangents: Projection[Matrices],
    plan: LaunchPlan,
    *,
    of_tokens: bool,
) -> Adapter | None:
    """The tangent of an adapter's part, as a part of one whose rank is that of all its terms together."""
    inner, factors = [], []

    def add(of_rows: Narrow, first: Tensor | None, second: Tensor | None) -> None:
        if first is not None and second is not None:
            inner.append(products.inner(of_rows, first, own.scaling, plan, of_tokens=of_tokens))
            factors.append(second)

    if d_rows is not None:
        add(d_rows, own.lora_a, own.lora_b)
    add(rows, tangents.lora_a, own.lora_b)
    add(rows, own.lora_a, tangents.lora_b)
    if not inner:
        return None
    return Adapter(*by_rows(torch.cat(inner, 1), rows.values.dtype, plan), torch.cat(factors, 2))


def _like(matrices: Matrices, tangent_of: Tensor) -> Tensor:
    """The tangent of dense matrices in their order of memory, for which the tiles were chosen."""
    assert isinstance(matrices, Tensor)
    if tangent_of.stride() == matrices.stride() and tangent_of.data_ptr() % 16 == matrices.data_ptr() % 16:
        return tangent_of
    return torch.empty_like(matrices).copy_(tangent_of)


def _sum(terms: list[Tensor]) -> Tensor | None:
    """Their sum in at least fp32, in their dtype."""
    if len(terms) < 2:
        return terms[0] if terms else None
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term
    return total.to(terms[0].dtype)
