"""Products in a loop over the experts that have rows."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import pairwise

import torch
from torch import Tensor

from executors._pipeline import cpu_product, half
from executors._pipeline.packed_matrices import PackedMatrices
from executors._pipeline.products import Matrices, result_dtype, widened
from executors._pipeline.zeros import zeros_like

PAIRED = 2**18  # numbers of a matrix from which on single rows are multiplied in pairs
IN_CACHE = 2**18  # numbers of rows that pass through several operators together: 1 MiB in fp32


class LoopProducts:
    """One product for each expert that has rows.

    Args:
        group_offsets: [E + 1] on the host.
    """

    paired = PAIRED

    def __init__(self, group_offsets: Tensor) -> None:
        places = enumerate(pairwise(group_offsets.tolist()))
        self._groups = [(expert, start, stop) for expert, (start, stop) in places if start < stop]
        self._end = self._groups[-1][2] if self._groups else 0

    def rows(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, m]: a [S, k] times matrices [E, m, k] transposed.

        With large matrices a single row is multiplied together with the next one, whose own expert then writes over it:
        oneDNN takes a quarter longer for one row than for two (docs/performance-log.md).
        """
        size = matrices.shape[1] * matrices.shape[2]
        least = 2 if size >= self.paired and cpu_product.multiplies(a.dtype) else 1
        out = a.new_empty(a.shape[0], matrices.shape[1], dtype=result_dtype(a, matrices))
        for matrix, start, stop in self._matrices(matrices):
            rows = slice(start, min(max(stop, start + least), self._end))
            self.multiply(a[rows], matrix.t(), out[rows])
            del matrix  # before the next one is decoded: it takes the same memory, warm in the cache
        return out

    def rows_back(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, k]: a [S, m] times matrices [E, m, k]."""
        out = a.new_empty(a.shape[0], matrices.shape[2], dtype=result_dtype(a, matrices))
        for matrix, start, stop in self._matrices(matrices):
            self.multiply(a[start:stop], matrix, out[start:stop])
            del matrix
        return out

    def outer(self, a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, m, k]: a [S, m] transposed times b [S, k], group by group; zeros for an expert without rows."""
        out = zeros_like(like, dtype)
        for expert, start, stop in self._groups:
            self.multiply_outer(a[start:stop], b[start:stop], out[expert])
        return out

    def multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out`` [n, m] = a [n, k] times one expert's b [k, m]."""
        a = widened(a, b.dtype)
        if a.device.type == "cpu":
            cpu_product.multiply(a, b, out)
        elif torch.float16 in (a.dtype, b.dtype):
            half.multiply(a, b, out)
        else:
            torch.mm(a, b, out=out)

    def multiply_outer(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out`` [m, k] = a [n, m] transposed times b [n, k]."""
        a, b = widened(a, out.dtype), widened(b, out.dtype)
        if a.device.type == "cpu":
            cpu_product.multiply_outer(a, b, out)
        elif out.dtype == torch.float16:
            half.multiply(a.t(), b, out)
        else:
            torch.mm(a.t(), b, out=out)

    def parts(self, width: int) -> Iterator[tuple[slice, LoopProducts]]:
        """The rows of each expert, or those of all where they are few."""
        if self._end * width <= IN_CACHE:
            yield slice(0, self._end), self
            return
        for expert, start, stop in self._groups:
            own = copy(self)
            own._groups, own._end = [(expert, 0, stop - start)], stop - start
            yield slice(start, stop), own

    def clear(self, rows: Tensor) -> Tensor:
        """The same tensor, with zeros written past the last group."""
        rows[self._end :].zero_()
        return rows

    def _matrices(self, matrices: Matrices) -> Iterator[tuple[Tensor, int, int]]:
        """Each expert's matrix with its rows' start and stop; one in 4 bits is decoded when its turn comes."""
        for place, (expert, start, stop) in enumerate(self._groups):
            yield (
                matrices.expert(expert, place) if isinstance(matrices, PackedMatrices) else matrices[expert],
                start,
                stop,
            )
