"""The tangent of y: how it changes with the layer's inputs and parameters, in the first order (forward mode).

It has the products of the layer, and for each tangent of what is multiplied one more. Roundings stand where those of
the layer stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from executors._base.arguments import Projection
from executors._pipeline import activation, post_norm
from executors._pipeline.grouping import combine, inverse_of, slot_weights
from executors._pipeline.layer import Layer, linear
from executors._pipeline.products import Matrices, Products
from executors._pipeline.projection import from_inner, inner


def tangent(layer: Layer, products: Products, tangents: dict[str, Tensor]) -> Tensor:
    """[T, H] The tangent of y, in x's dtype.

    Args:
        layer: as for `executors._pipeline.layer.forward`.
        products: as there.
        tangents: of "x", "topk_weights" and parameters, those that there are.
    """
    wide, row_of_slot = layer.wide, inverse_of(layer.order).view(layer.topk_ids.shape)
    d_weights = None
    if "topk_weights" in tangents:
        d_weights = slot_weights(layer.topk_ids, tangents["topk_weights"], layer.num_experts, layer.x.dtype)
    rows = layer.rows()
    z = linear(rows, layer.up, layer, products)
    dz = _linear_tangent(
        rows, _rows_tangent(layer, tangents, d_weights), layer.up, "gate_up", tangents, layer, products
    )
    del rows
    dh = None if dz is None else activation.tangent(z, dz, layer.act).to(layer.stored)
    del dz
    h = activation.forward(z, layer.act)
    del z
    o = linear(h, layer.down, layer, products)
    do = _linear_tangent(h, dh, layer.down, "down", tangents, layer, products)
    del h, dh
    if layer.norm is not None:
        do = post_norm.tangent_(o, do, layer.norm, tangents.get("post_expert_norm"))
    total = torch.zeros(layer.x.shape, dtype=wide, device=layer.x.device)
    if do is not None:
        weights = None if layer.scale_input else layer.weights()
        total += combine(products.clear(do.to(layer.stored)), row_of_slot, weights)
    if d_weights is not None and not layer.scale_input:
        total += combine(products.clear(o), row_of_slot, d_weights)
    return total.to(layer.x.dtype)


def _rows_tangent(layer: Layer, tangents: dict[str, Tensor], d_weights: Tensor | None) -> Tensor | None:
    """[S, H] The tangent of what the experts are given."""
    dx, tokens = tangents.get("x"), layer.tokens()
    d_rows = None if dx is None else dx.index_select(0, tokens)
    if not layer.scale_input:
        return d_rows
    terms = []
    if d_rows is not None:
        terms.append(layer.weights().reshape(-1)[layer.order, None] * d_rows)
    if d_weights is not None:
        terms.append(d_weights.reshape(-1)[layer.order, None] * layer.x.index_select(0, tokens))
    return sum(terms[1:], terms[0]).to(layer.stored) if terms else None


def _linear_tangent(
    rows: Tensor,
    d_rows: Tensor | None,
    projection: Projection[Matrices],
    name: str,
    tangents: dict[str, Tensor],
    layer: Layer,
    products: Products,
) -> Tensor | None:
    """[S, m] in at least fp32: the tangent of rows W^T, its adapter's part and its bias; None without tangents."""
    d_matrices, d_bias = tangents.get(f"{name}_proj"), tangents.get(f"{name}_proj_bias")
    d_a, d_b = tangents.get(f"{name}_lora_a"), tangents.get(f"{name}_lora_b")
    terms = []
    if d_rows is not None:
        terms.append(linear(d_rows, projection._replace(bias=None), layer, products))
    if d_matrices is not None:
        terms.append(products.rows(rows, d_matrices))
    if d_a is not None:
        terms.append(from_inner(inner(rows, projection._replace(lora_a=d_a), products), projection, rows, products))
    if d_b is not None:
        terms.append(from_inner(inner(rows, projection, products), projection._replace(lora_b=d_b), rows, products))
    if d_bias is not None:
        terms.append(d_bias.index_select(0, layer.experts()))
    wide = [term.to(layer.wide) for term in terms]
    return sum(wide[1:], wide[0]) if wide else None
