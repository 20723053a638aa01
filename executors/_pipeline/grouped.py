"""Products by one call of ``torch.nn.functional.grouped_mm``, mended where torch's operator falls short.

It wants strides of whole 16 bytes, leaves rows past the last group unwritten, and may write something for empty groups.
In some cases the loop over experts takes its place: fp16, whose results may pass its range where torch has them in fp16
only (E7), and on a CPU bf16 where the processor multiplies no matrices of it, or not soundly. In all of them torch's
operator is a loop over experts too, with the group offsets on the host.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from executors._pipeline import cpu_product
from executors._pipeline.loop import LoopProducts
from executors._pipeline.products import widened
from executors._protocol import Unsupported
from moe_ref.types import PARAMETERS
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_ref.types import MoEWeights

ALIGNMENT = 16  # bytes
INT32_MAX = 2**31 - 1
WITHOUT_HOST = ((9, 0), (10, 0))  # compute capabilities on which torch's bf16 kernel reads the offsets by itself


class GroupedProducts:
    """Products by ``torch.nn.functional.grouped_mm``.

    Args:
        group_offsets: [E + 1] on the device. (Trap: ``offs`` are inclusive ends, [E] and int32.)
    """

    def __init__(self, group_offsets: Tensor) -> None:
        self._offsets = group_offsets
        self._ends = group_offsets[1:].to(torch.int32)
        self._end = group_offsets[-1]
        self._empty = group_offsets[1:] == group_offsets[:-1]

    @cached_property
    def _loop(self) -> LoopProducts:
        return LoopProducts(self._offsets)  # waits for the GPU, as torch's operator would

    def rows(self, a: Tensor, matrices: Tensor) -> Tensor:
        """[S, m]: a [S, k] times matrices [E, m, k] transposed."""
        if _in_a_loop(a.device, matrices.dtype, a.shape[1]):
            return self._loop.rows(a, matrices)
        a = widened(a, matrices.dtype)
        return self._product(a, matrices.transpose(1, 2))

    def rows_back(self, a: Tensor, matrices: Tensor) -> Tensor:
        """[S, k]: a [S, m] times matrices [E, m, k]."""
        if _in_a_loop(a.device, matrices.dtype, a.shape[1]):
            return self._loop.rows_back(a, matrices)
        a = widened(a, matrices.dtype)
        return self._product(a, matrices)

    def outer(self, a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, m, k] in ``dtype``: a [S, m] transposed times b [S, k], group by group; the gradient of ``like``."""
        _check_rows(a)
        if _in_a_loop(a.device, dtype, 0):
            return self._loop.outer(a, b, like, dtype)
        a, b = widened(a, dtype), widened(b, dtype)
        if like.stride(1) < like.stride(2):  # stored by columns: so is its gradient
            return self._outer(b, a).transpose(1, 2)
        return self._outer(a, b)

    def parts(self, width: int) -> Iterator[tuple[slice, GroupedProducts]]:
        """All rows together."""
        yield slice(None), self

    def clear(self, rows: Tensor) -> Tensor:
        """The same tensor, with zeros written past the last group."""
        places = torch.arange(rows.shape[0], device=rows.device)
        return rows.masked_fill_((places >= self._end)[:, None], 0.0)

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        """[E, m, k]: a [S, m] transposed times b [S, k], group by group."""
        out = F.grouped_mm(_aligned_rows(a).t(), _aligned_rows(b), offs=self._ends)[:, : a.shape[1], : b.shape[1]]
        if out.is_cuda:  # some GPU kernels write something for groups without rows
            out.masked_fill_(self._empty[:, None, None], 0.0)
        return out

    def _product(self, a: Tensor, matrices: Tensor) -> Tensor:
        """[S, n]: a [S, r] times matrices [E, r, n]."""
        _check_rows(a)
        if _padding(a) or not _is_aligned(matrices):
            matrices = _copy(matrices.transpose(1, 2)).transpose(1, 2)  # of the whole stack: odd sizes, odd strides
        return F.grouped_mm(_aligned_rows(a), matrices, offs=self._ends)


def _in_a_loop(device: torch.device, dtype: torch.dtype, summed: int) -> bool:
    """Whether products of this dtype, of rows of so many numbers, go by the loop over experts."""
    if dtype == torch.float16 or device.type != "cpu":
        return dtype == torch.float16
    return not (cpu_product.multiplies(dtype) and cpu_product.keeps_rows_apart(dtype, summed))


def _check_rows(rows: Tensor) -> None:
    """E5: torch's ``offs`` are int32."""
    if rows.shape[0] > INT32_MAX:
        raise Unsupported(f"T*K={rows.shape[0]} slots: must be at most {INT32_MAX} for grouped_mm")


def _padding(value: Tensor) -> int:
    """Columns that are missing to whole 16 bytes."""
    return -value.shape[-1] % (ALIGNMENT // value.element_size())


def _copy(value: Tensor) -> Tensor:
    """The same in rows of whole 16 bytes, zeros after the last column."""
    padding = _padding(value)
    return F.pad(value, (0, padding)) if padding else value.clone(memory_format=torch.contiguous_format)


def _aligned_rows(value: Tensor) -> Tensor:
    pitch, column = value.stride()
    whole = _is_whole(value, pitch, value.storage_offset()) and not _padding(value)
    return value if whole and column == 1 and pitch >= value.shape[1] else _copy(value)


def _is_aligned(matrices: Tensor) -> bool:
    """Whether rows, or else columns, lie in one piece, and everything else is whole 16 bytes."""
    batch, row, column = matrices.stride()
    pitch, width = (row, matrices.shape[2]) if column == 1 else (column, matrices.shape[1])
    return 1 in (row, column) and pitch >= width and _is_whole(matrices, batch, pitch, matrices.storage_offset())


def _is_whole(value: Tensor, *places: int | torch.SymInt) -> bool:
    return all(place * value.element_size() % ALIGNMENT == 0 for place in places)


def host_note(x: Tensor, weights: MoEWeights) -> str:
    """Why a call waits for the GPU: that torch's operator reads the group offsets on the host; or ""."""
    if not x.is_cuda:
        return ""
    own = [parameter for name, parameter in weights.parameters().items() if name in PARAMETERS]
    adapters = [] if weights.lora is None else own
    narrow = all(tensor.dtype == torch.bfloat16 for tensor in (x, *adapters))
    if narrow and torch.cuda.get_device_capability(x.device) in WITHOUT_HOST:
        return ""
    return (
        "torch's grouped_mm reads the group offsets on the host, once per product: "
        "must be bfloat16, adapters too, on compute capability 9.0 or 10.0 to do without"
    )


def check_capture(x: Tensor, weights: MoEWeights) -> None:
    """Raises Unsupported where a call would break a capture."""
    note = host_note(x, weights)
    if note and torch.cuda.is_current_stream_capturing():
        raise Unsupported(f"x.dtype={dtype_name(x)} during CUDA-graph capture: {note}")
