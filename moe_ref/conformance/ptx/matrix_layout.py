"""Where operands of wgmma lie in shared memory, by their 64-bit descriptors.

PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": "Matrix Descriptor Format", "Strides" and
"Canonical Layouts". Memory is taken in chunks of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.tensor_map import swizzled
from moe_ref.conformance.ptx.text import Unreadable

SPANS = (0, 128, 64, 32)  # bytes of a swizzled row, by bits 62 and 63


def _fields(descriptor: Any) -> tuple[Any, Any, Any, int]:
    """First byte, leading and stride offsets in bytes, each [groups, 1], and the span of a swizzled row."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF)[:, None] << 4 for bit in (0, 16, 32))
    modes = np.unique(descriptor >> 62 & 3)
    if (descriptor >> 49 & 7).any() or len(modes) != 1:
        raise Unreadable("a matrix descriptor of wgmma: must have no base offset, and one swizzle for all")
    return start, leading, stride, SPANS[modes[0]]


def rows_of(descriptor: Any, rows: int) -> Any:
    """[groups, rows * 2] chunks of an operand whose inner dimension, of 32 bytes, is last in memory (K-major)."""
    start, leading, stride, span = _fields(descriptor)
    row, half = np.divmod(np.arange(2 * rows), 2)
    next_half = leading * half if span == 0 else 16 * half
    return swizzled(start + stride * (row // 8) + (span or 16) * (row % 8) + next_half, span)


def columns_of(descriptor: Any, rows: int) -> Any:
    """[groups, 16 * rows / 8] chunks of an operand in 16 bits whose rows are next to each other (MN-major)."""
    start, leading, stride, span = _fields(descriptor)
    k, chunk = np.divmod(np.arange(16 * rows // 8), rows // 8)
    if span == 0:
        return start + stride * chunk + leading * (k // 8) + 16 * (k % 8)
    wide = span // 16
    return swizzled(start + leading * (chunk // wide) + 16 * (chunk % wide) + span * (k % 8) + stride * (k // 8), span)
