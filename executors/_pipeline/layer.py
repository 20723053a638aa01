"""The layer on rows sorted by expert, forward and backward, for executors that differ in their products only.

Roundings stand where clause E2 allows them: products in x's dtype; biases, activations and the combine in at least
fp32. Beside fp16 what stands between products is fp32, since it may pass the range of fp16 where the result does not
(E7). Rows of empty slots stand last; what the products leave there is never used. Nothing here waits for a GPU, and
nothing adds by atomics, so results are bitwise repeatable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors._base.arguments import Activation, Norm, Projection
from executors._pipeline import activation, post_norm, projection
from executors._pipeline.grouping import combine, expert_of_rows, inverse_of, slot_weights
from executors._pipeline.products import Matrices, Products, stored_dtype


class Layer(NamedTuple):
    """Everything that a forward and a backward pass share."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    order: Tensor
    group_offsets: Tensor
    up: Projection[Matrices]
    down: Projection[Matrices]
    act: Activation
    scale_input: bool
    norm: Norm | None

    @property
    def wide(self) -> torch.dtype:
        """In which biases, activations and sums over slots are evaluated."""
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def stored(self) -> torch.dtype:
        """In which z, h, o and their gradients stand."""
        return stored_dtype(self.x.dtype)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.matrices.shape[0]

    def tokens(self) -> Tensor:
        """[S] The token of each row."""
        return self.order // self.topk_ids.shape[1]

    def weights(self) -> Tensor:
        """[T, K] Zero for empty slots."""
        return slot_weights(self.topk_ids, self.topk_weights, self.num_experts, self.x.dtype)

    def experts(self) -> Tensor:
        """[S] The expert of each row; any expert for rows of empty slots."""
        return expert_of_rows(self.topk_ids, self.order, self.num_experts)

    def rows(self) -> Tensor:
        """[S, H] What the experts are given: x, or its product with the weight (C3)."""
        rows = self.x.index_select(0, self.tokens())
        if not self.scale_input:
            return rows
        return (self.weights().reshape(-1)[self.order, None] * rows).to(self.stored)


def forward(layer: Layer, products: Products) -> tuple[Tensor, Tensor]:
    """y [T, H] and z [S, J]."""
    z = preactivations(layer, products)
    o = linear(activation.forward(z, layer.act), layer.down, layer, products)
    if layer.norm is not None:
        post_norm.forward_(o, layer.norm)
    return _combine(products.clear(o), layer, None if layer.scale_input else layer.weights()), z


def preactivations(layer: Layer, products: Products) -> Tensor:
    """z [S, J]."""
    return linear(layer.rows(), layer.up, layer, products)


def backward(layer: Layer, products: Products, z: Tensor, dy: Tensor, needs: dict[str, bool]) -> dict[str, Tensor]:
    """Gradients of whatever ``needs`` asks for, by name; what nobody asks for costs nothing.

    Args:
        layer: as for `forward`.
        products: as for `forward`.
        z: [S, J] from `forward`.
        dy: [T, H] the upstream gradient.
        needs: for "x", "topk_weights" and the names of parameters, whether a gradient is wanted.
    """
    found: dict[str, Tensor] = {}
    upstream = dy.index_select(0, layer.tokens())
    weight = None if layer.scale_input else layer.weights().reshape(-1)[layer.order, None]
    need_weights = needs["topk_weights"]
    of_outputs = need_weights and not layer.scale_input  # the weights' gradient is a product with o
    up_parameters = any(needs[name] for name in needs if name.startswith("gate_up"))
    need_rows = needs["x"] or (need_weights and layer.scale_input)
    need_dz = need_rows or up_parameters
    down_matrix, down_factors = needs["down_proj"], needs["down_lora_a"] or needs["down_lora_b"]
    uses_h = down_matrix or down_factors or of_outputs or layer.norm is not None
    h = activation.forward(z, layer.act) if uses_h else None
    if layer.norm is not None and h is not None:  # from here on weights and norm are in the upstream gradient
        o = linear(h, layer.down, layer, products)
        normed = post_norm.backward(o, layer.norm, upstream, weight, of_outputs, needs["post_expert_norm"])
        if normed.of_rows is not None:
            found["topk_weights"] = _weight_gradients(normed.of_rows, layer)
        if normed.of_factor is not None:
            found["post_expert_norm"] = _sums(normed.of_factor, layer).sum(0)
        upstream, weight, of_outputs = normed.d_outputs, None, False

    # Of the down projection: its parameters take the weighted gradient, h and the weight the unweighted one (D3).
    through = need_dz or of_outputs or needs["down_lora_a"]
    d_inner = projection.d_inner(upstream, layer.down, products) if through else None
    if down_matrix or needs["down_proj_bias"]:
        wide = upstream.to(layer.wide) if weight is None else weight * upstream
        if needs["down_proj_bias"]:
            found["down_proj_bias"] = _sums(wide, layer)
        if down_matrix and h is not None:
            found["down_proj"] = _outer(wide.to(layer.stored), h, layer.down, layer, products)
        del wide
    if down_factors and h is not None:
        _add_factors(found, "down", needs, h, upstream, d_inner, weight, layer.down, products)
    if need_dz or of_outputs:
        dh = projection.backward(upstream, layer.down, products, d_inner)
        if of_outputs and h is not None:  # <dy, o> without keeping o
            of_rows = _dots(dh, h, layer.wide)
            if layer.down.bias is not None:
                of_rows += _dots(upstream, layer.down.bias, layer.wide, layer.experts())
            found["topk_weights"] = _weight_gradients(of_rows, layer)
        del upstream, h
        if need_dz:
            dtype = layer.wide if needs["gate_up_proj_bias"] else layer.stored
            dz = activation.backward(z, dh, weight, layer.act, dtype)
            del dh
            _add_up(found, needs, layer, products, dz, need_rows)
    return found


def _add_up(
    found: dict[str, Tensor], needs: dict[str, bool], layer: Layer, products: Products, dz: Tensor, need_rows: bool
) -> None:
    """Adds the gradients of the up projection's parameters, of x, and of weights that scale it.

    dz [S, J] is in at least fp32 where the bias has a gradient.
    """
    if needs["gate_up_proj_bias"]:
        found["gate_up_proj_bias"] = _sums(dz, layer)
        dz = dz.to(layer.stored)
    factors = needs["gate_up_lora_a"] or needs["gate_up_lora_b"]
    d_inner = projection.d_inner(dz, layer.up, products) if needs["gate_up_lora_a"] or need_rows else None
    if needs["gate_up_proj"] or factors:
        rows = layer.rows()
        if needs["gate_up_proj"]:
            found["gate_up_proj"] = _outer(dz, rows, layer.up, layer, products)
        if factors:
            _add_factors(found, "gate_up", needs, rows, dz, d_inner, None, layer.up, products)
        del rows
    if not need_rows:
        return
    d_rows = projection.backward(dz, layer.up, products, d_inner)
    if layer.scale_input:
        wide = d_rows.to(layer.wide)
        if needs["topk_weights"]:
            found["topk_weights"] = _weight_gradients((wide * layer.x[layer.tokens()]).sum(1), layer)
        d_rows = (wide * layer.weights().reshape(-1)[layer.order, None]).to(layer.stored)
    if needs["x"]:
        found["x"] = _combine(products.clear(d_rows), layer, None)


def linear(rows: Tensor, own: Projection[Matrices], layer: Layer, products: Products) -> Tensor:
    """[S, m] Rows W^T, with the adapter's part and the bias."""
    return projection.forward(rows, own, layer.experts(), products, layer.wide)


def _outer(d_out: Tensor, rows: Tensor, own: Projection[Matrices], layer: Layer, products: Products) -> Tensor:
    """[E, m, k] The gradient of a projection's matrices."""
    assert isinstance(own.matrices, Tensor)
    return products.outer(d_out, rows, own.matrices, layer.x.dtype)


def _add_factors(
    found: dict[str, Tensor],
    name: str,
    needs: dict[str, bool],
    rows: Tensor,
    d_out: Tensor,
    d_inner: Tensor | None,
    weight: Tensor | None,
    own: Projection[Matrices],
    products: Products,
) -> None:
    names = f"{name}_lora_a", f"{name}_lora_b"
    needed = needs[names[0]], needs[names[1]]
    of_factors = projection.factor_gradients(rows, d_out, d_inner, weight, own, products, needed)
    found.update((key, value) for key, value in zip(names, of_factors, strict=True) if value is not None)


def _dots(a: Tensor, b: Tensor, wide: torch.dtype, places: Tensor | None = None) -> Tensor:
    """[S] The product of each row of a with that of b, or with the one of b at its place."""
    found = a.new_empty(a.shape[0], dtype=wide)
    for rows in activation.row_blocks(a):
        own = b[rows] if places is None else b.index_select(0, places[rows])
        torch.sum(a[rows].to(wide) * own, 1, out=found[rows])
    return found


def _sums(rows: Tensor, layer: Layer) -> Tensor:
    """[E, m] The sum of rows [S, m] over each group; exactly 0 for an expert without rows."""
    lengths = layer.group_offsets.diff().to(rows.device)  # the offsets may be on the host
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True)


def _combine(rows: Tensor, layer: Layer, weights: Tensor | None) -> Tensor:
    row_of_slot = inverse_of(layer.order).view(layer.topk_ids.shape)
    return combine(rows, row_of_slot, weights).to(layer.x.dtype)


def _weight_gradients(of_rows: Tensor, layer: Layer) -> Tensor:
    """[T, K] The gradients of the weights from those of the rows, exactly 0 for empty slots."""
    return of_rows[inverse_of(layer.order)].view(layer.topk_ids.shape).masked_fill(_empty(layer), 0.0)


def _empty(layer: Layer) -> Tensor:
    """[T, K] Slots that name no expert."""
    return (layer.topk_ids < 0) | (layer.topk_ids >= layer.num_experts)
