"""What an executor's way to multiply gives to the layer, and in which dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from executors._pipeline.packed_matrices import PackedMatrices

Matrices = Tensor | PackedMatrices  # [E, m, k]; of a PackedMatrices no gradient is ever asked for


class Products(Protocol):
    """Products of rows, sorted by expert, with that expert's matrix. Stacks are for executors of 4-bit weights.

    Rows past the last group are never read; what stands there in a result is unspecified, NaN at worst. Rows may be
    narrower than matrices of fp32 or fp64, and are widened. Beside fp16 matrices rows may be fp32. Results have the
    `result_dtype`.
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

    def parts(self, width: int) -> Iterator[tuple[slice, Products]]:
        """Rows that pass through several operators together, and the products of these rows with dense matrices.

        On a CPU those of one expert, where all of them are more than a cache holds, so many numbers wide.
        """

    def clear(self, rows: Tensor) -> Tensor:
        """The same tensor, with zeros written past the last group."""


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what stands between products, for an x of ``dtype``: fp32 beside fp16 (E7), else x's own."""
    return torch.float32 if dtype == torch.float16 else dtype


def result_dtype(a: Tensor, matrices: Matrices) -> torch.dtype:
    """The dtype of a product: the wider of both, and fp32 where that is fp16 (E7)."""
    if isinstance(matrices, PackedMatrices):
        return stored_dtype(a.dtype)
    return stored_dtype(torch.promote_types(a.dtype, matrices.dtype))


def widened(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as they are multiplied with what is in ``dtype``: in it, if that is fp32 or fp64."""
    return a.to(dtype) if dtype in (torch.float32, torch.float64) else a
