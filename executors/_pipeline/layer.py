"""The layer on rows sorted by expert, forward and backward, for executors that differ in their products only.

Roundings stand where clause E2 allows them: products in x's dtype; biases, activations and the combine in at least
fp32. Beside fp16 what stands between products is fp32, since it may pass the range of fp16 where the result does not
(E7). Rows of empty slots stand last; what the products leave there is never used. Nothing here waits for a GPU, and
nothing adds by atomics, so results are bitwise repeatable.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from executors._base.arguments import Activation, Norm, Projection
from executors._pipeline import activation, post_norm
from executors._pipeline.grouping import combine, expert_of_rows, inverse_of, slot_weights
from executors._pipeline.packed_matrices import PackedMatrices

Matrices = Tensor | PackedMatrices  # [E, m, k]; of a PackedMatrices no gradient is ever asked for


class Products(Protocol):
    """Products of rows, sorted by expert, with that expert's matrix. Stacks are for executors of 4-bit weights.

    Rows past the last group are never read; what stands there in a result is unspecified, NaN at worst. Beside fp16
    matrices rows may be fp32. Results have the `stored_dtype` of the rows.
    """

    def rows(self, a: Tensor, matrices: Any) -> Tensor:
        """[S, m]: a [S, k] times matrices [E, m, k] transposed."""

    def rows_back(self, a: Tensor, matrices: Any) -> Tensor:
        """[S, k]: a [S, m] times matrices [E, m, k]."""

    def outer(self, a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, m, k] in ``dtype``: a [S, m] transposed times b [S, k], group by group; the gradient of ``like``.

        Exactly 0 for an expert without rows (D2). Beside fp16 one of a and b may be fp32. It is stored in the order of
        ``like`` where that costs nothing.
        """

    def clear(self, rows: Tensor) -> Tensor:
        """The same tensor, with zeros written past the last group."""


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what stands between products, for an x of ``dtype``: fp32 beside fp16 (E7), else x's own."""
    return torch.float32 if dtype == torch.float16 else dtype


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
    if down_matrix or needs["down_proj_bias"] or down_factors:
        wide = upstream.to(layer.wide) if weight is None else weight * upstream
        weighted = wide.to(layer.stored)
        if needs["down_proj_bias"]:
            found["down_proj_bias"] = _sums(wide, layer)
        del wide
        if h is not None:
            _add_matrix_gradients(found, "down", needs, layer, products, h, weighted)
    if need_dz or of_outputs:
        dh = _linear_back(upstream, layer.down, products).to(layer.wide)
        if of_outputs and h is not None:  # <dy, o> without keeping o
            of_rows = (dh * h).sum(1)
            if layer.down.bias is not None:
                of_rows = of_rows + (upstream.to(layer.wide) * layer.down.bias[layer.experts()]).sum(1)
            found["topk_weights"] = _weight_gradients(of_rows, layer)
        if need_dz:
            dz = activation.backward(z, dh if weight is None else dh.mul_(weight), layer.act)
            if needs["gate_up_proj_bias"]:
                found["gate_up_proj_bias"] = _sums(dz, layer)
            dz = dz.to(layer.stored)
            if up_parameters:
                _add_matrix_gradients(found, "gate_up", needs, layer, products, layer.rows(), dz)
            if need_rows:
                d_rows = _linear_back(dz, layer.up, products)
                if layer.scale_input:
                    wide = d_rows.to(layer.wide)
                    if need_weights:
                        found["topk_weights"] = _weight_gradients((wide * layer.x[layer.tokens()]).sum(1), layer)
                    d_rows = (wide * layer.weights().reshape(-1)[layer.order, None]).to(layer.stored)
                if needs["x"]:
                    found["x"] = _combine(products.clear(d_rows), layer, None)
    return found


def linear(rows: Tensor, projection: Projection[Matrices], layer: Layer, products: Products) -> Tensor:
    """[S, m] Rows W^T, with the adapter's part and the bias."""
    total = products.rows(rows, projection.matrices)
    if projection.lora_b is not None:
        inner = inner_of(rows, projection, products)
        total = total.to(layer.wide) + adapter_part(inner, projection, rows, products)
    if projection.bias is not None:  # torch adds in at least fp32 and rounds once, in place too
        total.add_(projection.bias.index_select(0, layer.experts()))
    return total.to(layer.stored)


def _linear_back(d_out: Tensor, projection: Projection[Matrices], products: Products) -> Tensor:
    d_rows = products.rows_back(d_out, projection.matrices)
    if projection.lora_a is None:
        return d_rows
    d_inner = _d_inner(d_out, projection, products)
    added = products.rows_back(d_inner, _factor(projection.lora_a, d_out))
    return (d_rows.to(torch.promote_types(d_rows.dtype, added.dtype)) + added).to(d_rows.dtype)


def _add_matrix_gradients(
    found: dict[str, Tensor],
    name: str,
    needs: dict[str, bool],
    layer: Layer,
    products: Products,
    rows: Tensor,
    d_out: Tensor,
) -> None:
    projection = layer.down if name == "down" else layer.up
    if needs[f"{name}_proj"]:
        assert isinstance(projection.matrices, Tensor)
        found[f"{name}_proj"] = products.outer(d_out, rows, projection.matrices, layer.x.dtype)
    if projection.lora_a is None:
        return
    if needs[f"{name}_lora_a"]:
        d_inner = _d_inner(d_out, projection, products)
        found[f"{name}_lora_a"] = products.outer(d_inner, rows.to(d_inner.dtype), projection.lora_a, d_inner.dtype)
    if needs[f"{name}_lora_b"]:
        assert projection.lora_b is not None
        inner = inner_of(rows, projection, products)
        found[f"{name}_lora_b"] = products.outer(d_out.to(inner.dtype), inner, projection.lora_b, inner.dtype)


def inner_of(rows: Tensor, projection: Projection[Matrices], products: Products) -> Tensor:
    """[S, r] What stands between an adapter's factors: scaling (rows A^T)."""
    assert projection.lora_a is not None
    a = _factor(projection.lora_a, rows)
    return products.rows(rows.to(a.dtype), a) * projection.scaling


def adapter_part(inner: Tensor, projection: Projection[Matrices], rows: Tensor, products: Products) -> Tensor:
    """[S, m] What an adapter adds to rows W^T: inner B^T."""
    assert projection.lora_b is not None
    return products.rows(inner, _factor(projection.lora_b, rows))


def _d_inner(d_out: Tensor, projection: Projection[Matrices], products: Products) -> Tensor:
    """[S, r] The gradient of rows A^T."""
    assert projection.lora_b is not None
    b = _factor(projection.lora_b, d_out)
    return products.rows_back(d_out.to(b.dtype), b) * projection.scaling


def _factor(factor: Tensor, rows: Tensor) -> Tensor:
    """An adapter's factor in the dtype of its products: its own if it is the rows', else at least fp32."""
    if factor.dtype == rows.dtype:
        return factor
    return factor.to(torch.promote_types(rows.dtype, torch.float32))


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
