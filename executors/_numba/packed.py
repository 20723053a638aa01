"""Products of a few rows with experts in 4 bits, which the compiled kernels decode: all such experts in one call."""

from __future__ import annotations

from functools import cache
from math import gcd
from platform import machine

import numpy as np
import torch
from llvmlite import binding
from numba import config
from torch import Tensor

from executors._decode import MX_BLOCKSIZE, scales_of
from executors._decode.table import CODES, LOW_FIRST
from executors._numba.kernels import KINDS, LOOK_UP, multiply_decoded, multiply_decoded_shared
from executors._numba.launch import Group, run
from executors._pipeline.packed_matrices import PackedMatrices
from moe_ref.types import NF4Tensor, PackedTensor

BLOCK_BY_ROWS = 32  # columns of a job, at least: their matrix in 16 bits stays in the second cache
LARGEST_BY_ROWS = 2**18  # numbers of it
BLOCK_BY_COLUMNS = 1024  # at most


def block_of(stack: PackedMatrices, by_rows: bool) -> int:
    """Columns of a job with such a stack, so that each begins with a block of codes; 0 where there are none.

    Args:
        stack: experts in 4 bits.
        by_rows: whether sums run along rows as they are stored.
    """
    packed, blocksize = stack.packed, _blocksize(stack.packed)
    _, rows, width = packed.stored_shape
    if stack.filled or stack.decoded.shape[0] or packed.dtype not in ("bfloat16", "float16"):
        return 0
    if not _can_look_up() or rows * width % blocksize or not packed.codes.is_contiguous():
        return 0
    whole = blocksize // gcd(blocksize, width)  # rows that are whole blocks of codes
    if by_rows:
        block = -(-BLOCK_BY_ROWS // whole) * whole
        return block if block * width <= LARGEST_BY_ROWS else 0
    return 0 if width % blocksize else max(blocksize, BLOCK_BY_COLUMNS)  # both are powers of two


def multiply_packed(a: Tensor, stack: PackedMatrices, groups: list[Group], by_rows: bool) -> Tensor:
    """[S, m] fp32: rows ``start`` to ``stop - 1`` of a [S, k] times matrices [E, k, m][expert], for each group.

    Other rows are not written.

    Args:
        a: rows.
        stack: of which `block_of` knows a block.
        groups: expert, start and stop.
        by_rows: whether sums run along rows as they are stored.
    """
    packed = stack.packed
    a = a.to(torch.float32).contiguous()
    stored = packed.stored_shape[1:]
    columns, width = stored if by_rows else stored[::-1]
    out = a.new_empty(a.shape[0], columns)
    codes = packed.codes
    step = stored[0] * stored[1] // 2
    scales = [scales_of(packed, expert) for expert, _, _ in groups]
    places = [codes.data_ptr() + step * expert for expert, _, _ in groups]
    rows = [(start, stop - start) for _, start, stop in groups]
    table = [(*row, place, own.data_ptr()) for row, place, own in zip(rows, places, scales, strict=True)]
    block = block_of(stack, by_rows)
    made = np.array(table, dtype=np.int64)
    costs = np.repeat(np.maximum(made[:, 1], 4), -(-columns // block))
    form = _blocksize(packed), _values(packed.quant_type).ctypes.data, packed.quant_type in LOW_FIRST
    given = made, block, a.data_ptr(), width, columns, by_rows, *form, out.data_ptr(), KINDS[packed.dtype]
    run(multiply_decoded, multiply_decoded_shared, costs, given)
    return out


@cache
def _can_look_up() -> bool:
    """Whether the processor that Numba compiles for looks up bytes in a table by one instruction."""
    name = machine().lower()
    if name not in LOOK_UP or name in ("aarch64", "arm64"):
        return name in LOOK_UP
    generic = config.CPU_NAME == "generic"  # type: ignore[attr-defined]
    features = "" if generic else binding.get_host_cpu_features().flatten()
    return "+ssse3" in (config.CPU_FEATURES or features).split(",")  # type: ignore[attr-defined]


def _blocksize(packed: PackedTensor) -> int:
    """Codes with one scale."""
    return packed.blocksize if isinstance(packed, NF4Tensor) else MX_BLOCKSIZE


@cache
def _values(quant_type: str) -> np.ndarray:
    return np.array(CODES[quant_type], dtype=np.float32)
