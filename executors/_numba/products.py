"""Products in the loop over experts, a few rows of them by compiled kernels: all such experts in one call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from executors._numba.kernels import KINDS, add_outer, add_outer_shared, multiply, multiply_shared
from executors._numba.launch import Group, run
from executors._numba.packed import block_of, multiply_packed
from executors._pipeline import cpu_product
from executors._pipeline.loop import LoopProducts
from executors._pipeline.packed_matrices import PackedMatrices
from executors._pipeline.products import Matrices, result_dtype
from executors._pipeline.zeros import zeros_like
from moe_ref.validation import dtype_name

# Up to so many rows of an expert the kernels are faster than torch, measured (docs/performance-results.md): of matrices
# whose rows, or columns, are summed over in one piece; on processors with and without products of 16 bits.
BY_ROWS = {True: 4, False: 512}
BY_COLUMNS = {True: 4, False: 192}
OUTER = {True: 4, False: 96}  # of rows that are summed over, in the gradient of a matrix
PACKED = 16  # of experts in 4 bits at least so many: the kernels decode them faster, too
BLOCK_BY_ROWS = 32  # columns of a job: few enough for many jobs
BLOCK_BY_COLUMNS = 1024  # as many as leave jobs for all threads: rows of the matrix are read through
BLOCK_OUTER = 64  # rows of a gradient in a job


class NumbaProducts(LoopProducts):
    """The loop of `LoopProducts`, where experts with a few rows are multiplied by `executors._numba.kernels`.

    Args:
        group_offsets: [E + 1] on the host.
    """

    paired = sys.maxsize  # never: one row takes no longer than two

    def rows(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, m]: a [S, k] times matrices [E, m, k] transposed."""
        if isinstance(matrices, PackedMatrices):
            return self._packed_product(a, matrices, back=False)
        return self._product(a, matrices.transpose(1, 2))

    def rows_back(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, k]: a [S, m] times matrices [E, m, k]."""
        if isinstance(matrices, PackedMatrices):
            return self._packed_product(a, matrices, back=True)
        return self._product(a, matrices)

    def outer(self, a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, m, k]: a [S, m] transposed times b [S, k], group by group; zeros for an expert without rows."""
        out = zeros_like(like, dtype)
        limit = 0 if dtype == torch.float64 else OUTER[cpu_product.multiplies(dtype)]
        few = [group for group in self._groups if group[2] - group[1] <= limit]
        if few and out.stride(1) < out.stride(2):  # stored by columns
            _compiled_outer(b, a, out.transpose(1, 2), few)
        elif few:
            _compiled_outer(a, b, out, few)
        for expert, start, stop in self._groups:
            if stop - start > limit:
                self.multiply_outer(a[start:stop], b[start:stop], out[expert])
        return out

    def multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out`` [n, m] = a [n, k] times one expert's b [k, m]."""
        if a.shape[0] <= few_rows(b):
            out.copy_(_compiled(a, b[None], [(0, 0, a.shape[0])]))
        else:
            super().multiply(a, b, out)

    def _product(self, a: Tensor, matrices: Tensor) -> Tensor:
        """[S, m]: a [S, k] times matrices [E, k, m]."""
        limit = few_rows(matrices[0]) if matrices.shape[0] else 0
        return self._shared_out(
            a,
            matrices.shape[2],
            result_dtype(a, matrices),
            limit,
            partial(_compiled, a, matrices),
            lambda expert, _: matrices[expert],
        )

    def _packed_product(self, a: Tensor, stack: PackedMatrices, back: bool) -> Tensor:
        """[S, k] of a [S, m] times experts in 4 bits [E, m, k] if ``back``, else [S, m] of a [S, k], transposed."""
        by_rows = back == stack.packed.transposed
        table = BY_ROWS if by_rows else BY_COLUMNS
        limit = max(PACKED, table[cpu_product.multiplies(a.dtype)]) if block_of(stack, by_rows) else 0
        return self._shared_out(
            a,
            stack.shape[2 if back else 1],
            result_dtype(a, stack),
            limit,
            partial(multiply_packed, a, stack, by_rows=by_rows),
            lambda expert, place: stack.expert(expert, place) if back else stack.expert(expert, place).t(),
        )

    def _shared_out(
        self,
        a: Tensor,
        columns: int,
        dtype: torch.dtype,
        limit: int,
        all_at_once: Callable[[list[Group]], Tensor],
        matrix: Callable[[int, int], Tensor],
    ) -> Tensor:
        """[S, columns] in ``dtype``: groups of at most ``limit`` rows in one call, others by their matrix."""
        few = [group for group in self._groups if group[2] - group[1] <= limit]
        if few and len(few) == len(self._groups) and self._end == a.shape[0]:
            return all_at_once(few).to(dtype)
        out = a.new_empty(a.shape[0], columns, dtype=dtype)
        wide = all_at_once(few) if few else out
        for place, (expert, start, stop) in enumerate(self._groups):
            if stop - start <= limit:
                out[start:stop] = wide[start:stop]
            else:
                self.multiply(a[start:stop], matrix(expert, place), out[start:stop])
        return out


def few_rows_of(dtype: torch.dtype, kind: str) -> int:
    """Up to how many rows of x Wᵀ are compiled, of "dense" matrices or others in 4 bits."""
    rows = BY_ROWS[cpu_product.multiplies(dtype)]
    return rows if kind == "dense" else max(PACKED, rows)


def few_rows(b: Tensor) -> int:
    """Up to how many rows the kernels multiply with b [k, m]."""
    if b.dtype == torch.float64 or 1 not in b.stride():
        return 0
    table = BY_ROWS if b.stride(0) == 1 else BY_COLUMNS
    return table[cpu_product.multiplies(b.dtype)]


def _compiled(a: Tensor, matrices: Tensor, groups: list[Group]) -> Tensor:
    """[S, m] fp32: rows ``start`` to ``stop - 1`` of a [S, k] times matrices [E, k, m][expert], for each group.

    Other rows are not written.
    """
    a = a.to(torch.float32).contiguous()
    _, width, columns = matrices.shape
    out = a.new_empty(a.shape[0], columns)
    _, row, column = matrices.stride()
    size = matrices.element_size()
    block = BLOCK_BY_ROWS if row == 1 else BLOCK_BY_COLUMNS
    table = _table(matrices, groups)
    blocks = -(-columns // block)
    kind = KINDS[dtype_name(matrices)]
    given = table, block, a.data_ptr(), width, columns, row, column, size, out.data_ptr(), kind
    run(multiply, multiply_shared, np.repeat(np.maximum(table[:, 1], 2), blocks), given)
    return out


def _compiled_outer(a: Tensor, b: Tensor, out: Tensor, groups: list[Group]) -> None:
    """Writes ``out`` [E, m, k][expert] = aᵀ b of rows ``start`` to ``stop - 1`` of a [S, m], b [S, k] for each group.

    The matrices of ``out`` are contiguous.
    """
    a, b = (value.to(torch.float32).contiguous() for value in (a, b))
    _, height, width = out.shape
    table = _table(out, groups)
    blocks = -(-height // BLOCK_OUTER)
    kind = KINDS[dtype_name(out)]
    given = table, BLOCK_OUTER, a.data_ptr(), height, b.data_ptr(), width, out.element_size(), kind
    run(add_outer, add_outer_shared, np.repeat(np.maximum(table[:, 1], 4), blocks), given)


def _table(matrices: Tensor, groups: list[Group]) -> np.ndarray:
    """[G, 3] Each group's first row, its number of rows and the address of its expert's matrix."""
    pitch, first = matrices.stride(0) * matrices.element_size(), matrices.data_ptr()
    return np.array([(start, stop - start, first + pitch * expert) for expert, start, stop in groups], dtype=np.int64)
