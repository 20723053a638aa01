"""Products in the loop over experts, a few rows of them by compiled kernels: all such experts in one call."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from executors import _cpu_product
from executors._layer import Matrices, stored_dtype
from executors._loop import LoopProducts
from executors._numba.kernels import KINDS, add_outer, add_outer_shared, multiply, multiply_shared
from executors._stack import Stack
from executors._zeros import zeros_like
from moe_ref.validation import dtype_name

# Up to so many rows of an expert the kernels are faster than torch, measured (docs/performance.md): of matrices whose
# rows, or columns, are summed over in one piece; on processors with and without products of 16 bits.
BY_ROWS = {True: 4, False: 512}
BY_COLUMNS = {True: 4, False: 192}
OUTER = {True: 4, False: 96}  # of rows that are summed over, in the gradient of a matrix
BLOCK_BY_ROWS = 32  # columns of a job: few enough for many jobs
BLOCK_BY_COLUMNS = 1024  # as many as leave jobs for all threads: rows of the matrix are read through
BLOCK_OUTER = 64  # rows of a gradient in a job
_ONE_CALL = Lock()  # at a time: not all of Numba's ways to share work among threads can be entered twice


class NumbaProducts(LoopProducts):
    """The loop of `LoopProducts`, where experts with a few rows are multiplied by `executors._numba.kernels`.

    Args:
        group_offsets: [E + 1] on the host.
    """

    paired = sys.maxsize  # never: one row takes no longer than two

    def rows(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, m]: a [S, k] times matrices [E, m, k] transposed."""
        if isinstance(matrices, Stack):
            return super().rows(a, matrices)
        return self._product(a, matrices.transpose(1, 2))

    def rows_back(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, k]: a [S, m] times matrices [E, m, k]."""
        if isinstance(matrices, Stack):
            return super().rows_back(a, matrices)
        return self._product(a, matrices)

    def outer(self, a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, m, k]: a [S, m] transposed times b [S, k], group by group; zeros for an expert without rows."""
        out = zeros_like(like, dtype)
        limit = 0 if dtype == torch.float64 else OUTER[_cpu_product.multiplies(dtype)]
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
        few = [group for group in self._groups if group[2] - group[1] <= limit]
        dtype = stored_dtype(a.dtype)
        if len(few) == len(self._groups) and self._end == a.shape[0]:
            return _compiled(a, matrices, few).to(dtype)
        out = a.new_empty(a.shape[0], matrices.shape[2], dtype=dtype)
        wide = _compiled(a, matrices, few) if few else out
        for expert, start, stop in self._groups:
            if stop - start <= limit:
                out[start:stop] = wide[start:stop]
            else:
                super().multiply(a[start:stop], matrices[expert], out[start:stop])
        return out


def few_rows(b: Tensor) -> int:
    """Up to how many rows the kernels multiply with b [k, m]."""
    if b.dtype == torch.float64 or 1 not in b.stride():
        return 0
    table = BY_ROWS if b.stride(0) == 1 else BY_COLUMNS
    return table[_cpu_product.multiplies(b.dtype)]


def _compiled(a: Tensor, matrices: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
    """[S, m] fp32: rows ``start`` to ``stop - 1`` of a [S, k] times matrices [E, k, m][expert], for each group.

    Other rows are not written.
    """
    a = a.to(torch.float32).contiguous()
    _, width, columns = matrices.shape
    out = a.new_empty(a.shape[0], columns)
    if not width or not columns or not groups:
        return out.zero_()
    _, row, column = matrices.stride()
    size = matrices.element_size()
    block = BLOCK_BY_ROWS if row == 1 else BLOCK_BY_COLUMNS
    table = _table(matrices, groups)
    blocks = -(-columns // block)
    kind = KINDS[dtype_name(matrices)]
    given = table, block, a.data_ptr(), width, columns, (row, column), size, out.data_ptr(), kind
    _run(multiply, multiply_shared, np.repeat(np.maximum(table[:, 1], 2), blocks), given)
    return out


def _compiled_outer(a: Tensor, b: Tensor, out: Tensor, groups: list[tuple[int, int, int]]) -> None:
    """Writes ``out`` [E, m, k][expert] = aᵀ b of rows ``start`` to ``stop - 1`` of a [S, m], b [S, k] for each group.

    The matrices of ``out`` are contiguous.
    """
    if not out.numel():
        return
    a, b = (value.to(torch.float32).contiguous() for value in (a, b))
    _, height, width = out.shape
    table = _table(out, groups)
    blocks = -(-height // BLOCK_OUTER)
    kind = KINDS[dtype_name(out)]
    given = table, BLOCK_OUTER, a.data_ptr(), height, b.data_ptr(), width, out.element_size(), kind
    _run(add_outer, add_outer_shared, np.repeat(np.maximum(table[:, 1], 4), blocks), given)


def _table(matrices: Tensor, groups: list[tuple[int, int, int]]) -> np.ndarray:
    """[G, 3] Each group's first row, its number of rows and the address of its expert's matrix."""
    pitch, first = matrices.stride(0) * matrices.element_size(), matrices.data_ptr()
    return np.array([(start, stop - start, first + pitch * expert) for expert, start, stop in groups], dtype=np.int64)


def _run(alone: Any, shared: Any, costs: np.ndarray, given: tuple[Any, ...]) -> None:
    """All jobs, of about these costs: by ``alone``, or by ``shared`` among as many threads as torch has."""
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if count == 1:  # no threads at all: those of OpenMP do not survive a fork
        alone(0, len(costs), *given)
        return
    with _ONE_CALL:
        before = numba.get_num_threads()
        numba.set_num_threads(count)
        try:
            shared(_bounds(costs, count), *given)
        finally:
            numba.set_num_threads(before)


def _bounds(costs: np.ndarray, threads: int) -> np.ndarray:
    """[threads + 1] Where each thread's jobs begin, and their number: shares of about the same cost."""
    done = np.cumsum(costs)
    shares = np.searchsorted(done, done[-1] * np.arange(1, threads) / threads, side="left") + 1
    return np.array([0, *np.minimum(shares, len(costs)), len(costs)], dtype=np.int64)
