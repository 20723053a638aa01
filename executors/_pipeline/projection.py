"""A projection on sorted rows, forward and backward: its matrices, and an adapter and a bias if it has them.

An adapter stays apart (W + scaling B A is never formed): rows pass through its two factors, in the factors'
dtype if it is the rows', else in at least fp32. What it adds is added expert by expert where many rows are wide: these
numbers stay in a CPU's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from executors._base.arguments import Projection
from executors._pipeline.products import Matrices, Products


def forward(
    rows: Tensor, projection: Projection[Matrices], experts: Tensor, products: Products, wide: torch.dtype
) -> Tensor:
    """[S, m], rounded once after the bias (E2).

    Args:
        rows: [S, k].
        projection: its parameters.
        experts: [S] the expert of each row.
        products: the way to multiply.
        wide: the dtype of sums.
    """
    total = products.rows(rows, projection.matrices)
    bias = projection.bias
    if projection.lora_b is None:
        # torch adds in at least fp32 and rounds once, in place too
        return total if bias is None else total.add_(bias.index_select(0, experts))
    b, scaled = _factor(projection.lora_b, rows), inner(rows, projection, products)
    for part, own in products.parts(total.shape[1]):
        added = total[part].to(wide).add_(own.rows(scaled[part], b))
        if bias is not None:
            added.add_(bias.index_select(0, experts[part]))
        total[part] = added
    return total


def backward(d_out: Tensor, projection: Projection[Matrices], products: Products, d_inner: Tensor | None) -> Tensor:
    """[S, k]: the gradient of the rows, from d_out [S, m] and, with an adapter, the gradient of what is inside."""
    d_rows = products.rows_back(d_out, projection.matrices)
    if projection.lora_a is None or d_inner is None:
        return d_rows
    a = _factor(projection.lora_a, d_out)
    wide = torch.promote_types(d_rows.dtype, a.dtype)
    for part, own in products.parts(d_rows.shape[1]):
        d_rows[part] = d_rows[part].to(wide).add_(own.rows_back(d_inner[part], a))
    return d_rows


def inner(rows: Tensor, projection: Projection[Matrices], products: Products) -> Tensor:
    """[S, r] What stands between an adapter's factors: scaling (rows A^T)."""
    assert projection.lora_a is not None
    return products.rows(rows, _factor(projection.lora_a, rows)).mul_(projection.scaling)


def from_inner(inside: Tensor, projection: Projection[Matrices], rows: Tensor, products: Products) -> Tensor:
    """[S, m] What an adapter adds to rows W^T: the product of what stands between its factors with B^T."""
    assert projection.lora_b is not None
    return products.rows(inside, _factor(projection.lora_b, rows))


def d_inner(d_out: Tensor, projection: Projection[Matrices], products: Products) -> Tensor | None:
    """[S, r] The gradient of rows A^T; None without an adapter."""
    if projection.lora_b is None:
        return None
    return products.rows_back(d_out, _factor(projection.lora_b, d_out)).mul_(projection.scaling)


def factor_gradients(
    rows: Tensor,
    d_out: Tensor,
    of_inner: Tensor | None,
    weight: Tensor | None,
    projection: Projection[Matrices],
    products: Products,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A [E, r, k] and B [E, m, r], those that are needed.

    Args:
        rows: [S, k] what the projection was given.
        d_out: [S, m] the gradient of what it gave, but for the weight.
        of_inner: [S, r] from `d_inner`, of this d_out; wanted for A.
        weight: [S, 1] the weight of each row, or None for ones. It multiplies the small factors, not d_out.
        projection: its parameters.
        products: the way to multiply.
        needs: whether A's and whether B's gradient is wanted.
    """
    assert projection.lora_a is not None
    assert projection.lora_b is not None
    of_a = of_b = None
    if needs[0] and of_inner is not None:
        left = _weighted(of_inner, weight)
        of_a = products.outer(left, rows, projection.lora_a, left.dtype)
    if needs[1]:
        right = _weighted(inner(rows, projection, products), weight)
        of_b = products.outer(d_out, right, projection.lora_b, right.dtype)
    return of_a, of_b


def _weighted(value: Tensor, weight: Tensor | None) -> Tensor:
    return value if weight is None else (value * weight).to(value.dtype)


def _factor(factor: Tensor, rows: Tensor) -> Tensor:
    """An adapter's factor in the dtype of its products: its own if it is the rows', else at least fp32."""
    if factor.dtype == rows.dtype:
        return factor
    return factor.to(torch.promote_types(rows.dtype, torch.float32))
