"""Projections in 4 bits as the product kernels take them (`executors._triton.kernels.packed`)."""

from __future__ import annotations

import struct
from math import ceil, gcd
from typing import Any, NamedTuple

from torch import Tensor

from executors._decode.table import CODES, LOW_FIRST
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor

MX_BLOCKSIZE = 32
BITS = {name: struct.unpack("16i", struct.pack("16f", *numbers)) for name, numbers in CODES.items()}
LEAST_ROW = 32  # codes: rows of whole 16 bytes
WORD = 8  # codes that are loaded at once at least, where rows allow it
MOST_HELD = 8  # bytes of scales


class CodeFormat(NamedTuple):
    """What a kernel knows of codes when it is compiled.

    Attributes:
        table: the number of each code, as the bits of a fp32: Triton would turn a constant -0 into 0.
        low_first: whether the low nibble comes first.
        by_rows: whether k, along which products sum, is the last dimension in memory.
        grain: neighbours along that dimension that always share a block; 1 if rows begin within bytes.
        grain_bits, block_bits: binary logarithms of the grain and of the blocksize.
        span: bytes of scales of a row that are loaded at once and held while k runs over their blocks; 0 for none.
        powers: whether scales are exponents of two.
        nested: whether scales are 8-bit codes themselves.
        segmented: whether each expert has nested statistics of its own.
        nested_blocksize: of those.
    """

    table: tuple[int, ...]
    low_first: bool
    by_rows: bool
    grain: int
    grain_bits: int
    block_bits: int
    span: int
    powers: bool
    nested: bool
    segmented: bool
    nested_blocksize: int


class Codes(NamedTuple):
    """A kernel's arguments for a projection in 4 bits.

    Attributes:
        codes: two in a byte.
        scales: of blocks, and the nested statistics if there are some.
        strides: bytes from one expert to the next, and from one row in memory to the next.
        format: what the kernel knows when it is compiled.
    """

    codes: Tensor
    scales: tuple[Any, ...]
    strides: tuple[int, int, int]
    format: CodeFormat


def is_fused(codes: CodeFormat | None) -> bool:
    """Whether the compiler may fuse a product and a sum into one rounding: not for nested scales (Q3)."""
    return codes is None or not codes.nested


def is_aligned(packed: PackedTensor, *, decoded: bool = False) -> bool:
    """Whether codes can be loaded at least 8 bytes at a time, and rows of the other operand 16.

    With ``decoded``, whether the decoded numbers can be loaded 16 bytes at a time.
    """
    _, outer, inner = packed.stored_shape
    if decoded:
        return outer % 16 == 0 and inner % 16 == 0
    return outer % 16 == 0 and inner % LEAST_ROW == 0 and packed.codes.data_ptr() % 16 == 0


def codes_of(packed: PackedTensor, widths: tuple[int, int], halves: int) -> Codes:
    """A projection [E, m, k] for tiles of so many rows and columns.

    Args:
        packed: the projection.
        widths: of a tile, along m and along k.
        halves: 2 if tiles begin at m / 2 too, else 1.
    """
    _, outer, inner = packed.stored_shape
    by_rows = not packed.transposed
    blocksize = packed.blocksize if isinstance(packed, NF4Tensor) else MX_BLOCKSIZE
    begins = inner if by_rows else inner // halves  # rows and tiles begin at multiples of the powers of two in it
    codes = packed.codes.contiguous()
    grain = gcd(begins, inner, blocksize, widths[1 if by_rows else 0])
    if grain % WORD or codes.data_ptr() % 4:
        grain = 1
    whole = grain > 1
    strides = (outer * inner // 2, inner // 2, 0) if whole else (0, 0, 0)
    scales, nested = _scales(packed)
    code_format = CodeFormat(
        table=BITS[packed.quant_type],
        low_first=packed.quant_type in LOW_FIRST,
        by_rows=by_rows,
        grain=grain,
        grain_bits=grain.bit_length() - 1,
        block_bits=blocksize.bit_length() - 1,
        span=_span(packed, blocksize, scales[0], widths[1], nested) if by_rows and whole else 0,
        powers=isinstance(packed, MXFP4Tensor),
        **nested,
    )
    return Codes(codes, scales, strides, code_format)


def _span(packed: PackedTensor, blocksize: int, scales: Tensor, width: int, nested: dict[str, Any]) -> int:
    """Bytes of scales that are held: as many as every row begins at a multiple of, if a step of k has no more blocks.

    None in fp32: its products are bound by their multiplications, and have no registers left.

    Args:
        packed: the projection.
        blocksize: numbers of a block.
        scales: of all blocks, in order.
        width: of a tile along k.
        nested: of `CodeFormat`.
    """
    inner = packed.stored_shape[2]
    if scales.element_size() > 1 or inner % blocksize or packed.dtype == "float32":
        return 0
    span = gcd(inner // blocksize, scales.data_ptr(), nested["nested_blocksize"], MOST_HELD)
    return span if span > 1 and span * blocksize >= width else 0


def _scales(packed: PackedTensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(packed, MXFP4Tensor):
        return (packed.scales.contiguous(),), {"nested": False, "segmented": False, "nested_blocksize": 0}
    assert isinstance(packed, NF4Tensor)
    absmax = packed.absmax.contiguous()
    if packed.nested_absmax is None or packed.nested_code is None or packed.nested_offset is None:
        return (absmax,), {"nested": False, "segmented": False, "nested_blocksize": 0}
    nested = {"nested": True, "segmented": packed.nested_offset.ndim > 0, "nested_blocksize": packed.nested_blocksize}
    arrays = [value.contiguous() for value in (packed.nested_absmax, packed.nested_code, packed.nested_offset)]
    blocks = absmax.shape[0] // packed.segments
    return (absmax, *arrays, ceil(blocks / packed.nested_blocksize), blocks), nested
