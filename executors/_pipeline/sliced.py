"""Products with experts in 4 bits, decoded a few at a time, without a look at what only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from executors._pipeline.grouped import GroupedProducts
from executors._pipeline.packed_matrices import PackedMatrices
from executors._pipeline.products import Matrices, stored_dtype

SLICES = 8  # of all experts: what is decoded at a time is an eighth of a projection


class SlicedProducts(GroupedProducts):
    """Products by ``grouped_mm``; a projection in 4 bits is decoded in slices of experts.

    A plan is made on the device: experts that have rows come first, in increasing order. There are at most as many as
    slots, so the host knows how many slices there are; the last ones may hold experts without rows. A slice's rows
    stand together; they are moved to the front, since the groups of ``grouped_mm`` begin there. What is fp16 is widened
    to fp32, a slice at a time, since results may pass the range of fp16 (E7). Adapters, and a dense projection beside
    one in 4 bits, are multiplied as a whole, and widened as a whole.

    Args:
        group_offsets: [E + 1] on the device.
    """

    def __init__(self, group_offsets: Tensor) -> None:
        super().__init__(group_offsets)
        empty = group_offsets[1:] == group_offsets[:-1]
        self._experts = torch.sort(empty.to(torch.uint8), stable=True).indices
        starts, ends = (bounds.index_select(0, self._experts) for bounds in (group_offsets[:-1], group_offsets[1:]))
        past = empty.index_select(0, self._experts)
        self._starts, self._stops = (
            bounds.masked_fill(past, 0) + past * group_offsets[-1] for bounds in (starts, ends)
        )

    def rows(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, m]: a [S, k] times matrices [E, m, k] transposed."""
        if not isinstance(matrices, PackedMatrices):
            return super().rows(_widened(a), _widened(matrices))
        return self._by_slices(_widened(a), matrices, back=False)

    def rows_back(self, a: Tensor, matrices: Matrices) -> Tensor:
        """[S, k]: a [S, m] times matrices [E, m, k]."""
        if not isinstance(matrices, PackedMatrices):
            return super().rows_back(_widened(a), _widened(matrices))
        return self._by_slices(_widened(a), matrices, back=True)

    def outer(self, a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, m, k] in ``dtype``: a [S, m] transposed times b [S, k], group by group; of what is dense."""
        return super().outer(_widened(a), _widened(b), like, stored_dtype(dtype)).to(dtype)

    def _by_slices(self, a: Tensor, matrices: PackedMatrices, back: bool) -> Tensor:
        slots, num_experts = a.shape[0], len(self._experts)
        out = a.new_empty(slots + 1, matrices.shape[2 if back else 1])  # the last row takes what is of no expert here
        step = -(-num_experts // SLICES)
        rows = torch.arange(slots, device=a.device)
        for first in range(0, min(num_experts, slots), step):
            places = slice(first, min(first + step, num_experts, slots))
            decoded = matrices.experts(self._experts[places], places)
            start, stops = self._starts[first], self._stops[places]
            part = GroupedProducts(torch.cat([start[None], stops]) - start)
            moved = (rows + start) % slots
            own = a.index_select(0, moved)
            decoded = _widened(decoded)
            products = part.rows_back(own, decoded) if back else part.rows(own, decoded)
            out.index_copy_(0, moved.masked_fill(rows >= stops[-1] - start, slots), products)
            del decoded, own, products  # before the next slice is decoded
        return out[:slots]


def _widened(value: Tensor) -> Tensor:
    return value.to(stored_dtype(value.dtype))
