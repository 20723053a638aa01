"""Kernels that Numba compiles: a few rows of each expert times its matrix, whose numbers are widened in registers.

Tensors are passed by the address of their first number and their strides in numbers. A job is a block of columns of one
group's result. It is computed in an order that depends on sizes only, so how jobs are shared out among threads changes
no bit. Sums are fp32, over as many partial sums as the processor's registers hold (E2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

COLUMNS = 64  # of a job
SUMMED = 512  # numbers of each row that are multiplied at a time: those of some rows stay in the first cache
ZERO = np.float32(0.0)
# A number whose type names the dtype of matrices.
KINDS = {"bfloat16": np.uint16(0), "float16": np.int16(0), "float32": np.float32(0)}

I16, I32, FP16, FP32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def compiled(function: Callable[..., Any], parallel: bool = False) -> Any:
    """The function, to be compiled at its first call, and kept on disk if it can be; it lets go of Python's lock.

    Sums may be reordered, and products fused into them; NaN and infinity stay what they are.
    """
    options: dict[str, Any] = {"fastmath": {"reassoc", "contract"}, "nogil": True, "error_model": "numpy"}
    options["parallel"] = parallel
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written
        return njit(**options)(function)


@intrinsic
def _number(_context: Any, address: Any, index: Any, kind: Any) -> Any:
    """The number at an index, widened to fp32: bf16, fp16 or fp32, by the type of ``kind``."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        stored = {types.uint16: I16, types.int16: FP16, types.float32: FP32}[kind]
        place = builder.gep(builder.inttoptr(args[0], stored.as_pointer()), [args[1]])
        number = builder.load(place)
        if kind == types.uint16:  # the upper half of an fp32 number
            return builder.bitcast(builder.shl(builder.zext(number, I32), ir.Constant(I32, 16)), FP32)
        return builder.fpext(number, FP32) if kind == types.int16 else number

    return types.float32(types.int64, types.int64, kind), generate


@intrinsic
def _write(_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes an fp32 number at an index."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], FP32.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@compiled
def _one_row(count: int, a: int, b0: int, b1: int, b2: int, b3: int, kind: Any) -> tuple[float, ...]:
    s0 = s1 = s2 = s3 = ZERO
    for k in range(count):
        x = _number(a, k, ZERO)
        s0 += x * _number(b0, k, kind)
        s1 += x * _number(b1, k, kind)
        s2 += x * _number(b2, k, kind)
        s3 += x * _number(b3, k, kind)
    return s0, s1, s2, s3


@compiled
def _two_rows(count: int, a0: int, a1: int, b0: int, b1: int, b2: int, b3: int, kind: Any) -> tuple[float, ...]:
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = ZERO
    for k in range(count):
        x0, x1 = _number(a0, k, ZERO), _number(a1, k, ZERO)
        y0, y1, y2, y3 = _number(b0, k, kind), _number(b1, k, kind), _number(b2, k, kind), _number(b3, k, kind)
        s00 += x0 * y0
        s01 += x0 * y1
        s02 += x0 * y2
        s03 += x0 * y3
        s10 += x1 * y0
        s11 += x1 * y1
        s12 += x1 * y2
        s13 += x1 * y3
    return s00, s01, s02, s03, s10, s11, s12, s13


@compiled
def _four_rows(
    count: int, a0: int, a1: int, a2: int, a3: int, b0: int, b1: int, b2: int, kind: Any
) -> tuple[float, ...]:
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = s30 = s31 = s32 = ZERO
    for k in range(count):
        x0, x1, x2, x3 = _number(a0, k, ZERO), _number(a1, k, ZERO), _number(a2, k, ZERO), _number(a3, k, ZERO)
        y0, y1, y2 = _number(b0, k, kind), _number(b1, k, kind), _number(b2, k, kind)
        s00 += x0 * y0
        s01 += x0 * y1
        s02 += x0 * y2
        s10 += x1 * y0
        s11 += x1 * y1
        s12 += x1 * y2
        s20 += x2 * y0
        s21 += x2 * y1
        s22 += x2 * y2
        s30 += x3 * y0
        s31 += x3 * y1
        s32 += x3 * y2
    return s00, s01, s02, s10, s11, s12, s20, s21, s22, s30, s31, s32


@compiled
def _by_rows(
    a: int, rows: int, b: int, pitch: int, size: int, columns: int, width: int, out: int, stride: int, kind: Any
) -> None:
    """out [rows, columns] = a [rows, width] times b [columns, width] transposed.

    Four rows at a time, which the first cache holds, while columns of b pass by. Where a tile has a row or a column too
    many, it is the last one once more, with the same bits.
    """
    row, end = 0, columns - 1
    while row < rows:
        left = rows - row
        r0, r1, r2, r3 = row, min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
        a0, a1, a2, a3 = (a + 4 * width * r0, a + 4 * width * r1, a + 4 * width * r2, a + 4 * width * r3)
        o0, o1, o2, o3 = (out + 4 * stride * r0, out + 4 * stride * r1, out + 4 * stride * r2, out + 4 * stride * r3)
        if left > 2:
            for j in range(0, columns, 3):
                j1, j2 = min(j + 1, end), min(j + 2, end)
                b0, b1, b2 = b + size * pitch * j, b + size * pitch * j1, b + size * pitch * j2
                s = _four_rows(width, a0, a1, a2, a3, b0, b1, b2, kind)
                _write(o0, j, s[0])
                _write(o0, j1, s[1])
                _write(o0, j2, s[2])
                _write(o1, j, s[3])
                _write(o1, j1, s[4])
                _write(o1, j2, s[5])
                _write(o2, j, s[6])
                _write(o2, j1, s[7])
                _write(o2, j2, s[8])
                _write(o3, j, s[9])
                _write(o3, j1, s[10])
                _write(o3, j2, s[11])
            row += 4
        else:
            for j in range(0, columns, 4):
                j1, j2, j3 = min(j + 1, end), min(j + 2, end), min(j + 3, end)
                b0, b1 = b + size * pitch * j, b + size * pitch * j1
                b2, b3 = b + size * pitch * j2, b + size * pitch * j3
                if left == 2:
                    s = _two_rows(width, a0, a1, b0, b1, b2, b3, kind)
                    _write(o1, j, s[4])
                    _write(o1, j1, s[5])
                    _write(o1, j2, s[6])
                    _write(o1, j3, s[7])
                    _write(o0, j, s[0])
                    _write(o0, j1, s[1])
                    _write(o0, j2, s[2])
                    _write(o0, j3, s[3])
                else:
                    t = _one_row(width, a0, b0, b1, b2, b3, kind)
                    _write(o0, j, t[0])
                    _write(o0, j1, t[1])
                    _write(o0, j2, t[2])
                    _write(o0, j3, t[3])
            row += 2


@compiled
def _add_rows(
    count: int, out: int, x0: float, x1: float, x2: float, x3: float, b0: int, b1: int, b2: int, b3: int, kind: Any
) -> None:
    for j in range(count):
        s = _number(out, j, ZERO) + x0 * _number(b0, j, kind) + x1 * _number(b1, j, kind)
        _write(out, j, s + x2 * _number(b2, j, kind) + x3 * _number(b3, j, kind))


@compiled
def _by_columns(
    a: int, rows: int, b: int, pitch: int, size: int, columns: int, width: int, out: int, stride: int, kind: Any
) -> None:
    """out [rows, columns] = a [rows, width] times b [width, columns], whose rows pass by once."""
    for row in range(rows):
        for j in range(columns):
            _write(out, row * stride + j, ZERO)
    for k in range(0, width, 4):
        k1, k2, k3 = min(k + 1, width - 1), min(k + 2, width - 1), min(k + 3, width - 1)
        b0, b1, b2, b3 = (b + size * pitch * k, b + size * pitch * k1, b + size * pitch * k2, b + size * pitch * k3)
        for row in range(rows):
            at = row * width
            x0 = _number(a, at + k, ZERO)
            x1 = _number(a, at + k1, ZERO) if k + 1 < width else ZERO
            x2 = _number(a, at + k2, ZERO) if k + 2 < width else ZERO
            x3 = _number(a, at + k3, ZERO) if k + 3 < width else ZERO
            _add_rows(columns, out + 4 * row * stride, x0, x1, x2, x3, b0, b1, b2, b3, kind)


@compiled
def multiply(
    first: int,
    last: int,
    groups: Any,
    block: int,
    a: int,
    width: int,
    columns: int,
    strides: Any,
    size: int,
    out: int,
    kind: Any,
) -> None:
    """Jobs of out [S, columns] = a [S, width] times a matrix [width, columns] for each group of rows.

    Args:
        first: of the jobs; a group has one for each block of columns.
        last: the job past the last one.
        groups: [G, 3] int64: the first row, the number of rows, the address of the matrix.
        block: columns of a job.
        a: address of fp32 numbers, contiguous.
        width: numbers that are summed over.
        columns: of the result.
        strides: of the matrices, in numbers: along the width, along the columns; one of them is 1.
        size: bytes of a matrix' number.
        out: address of fp32 numbers, contiguous; only rows of the groups are written.
        kind: of `KINDS`.
    """
    blocks = -(-columns // block)
    by_rows = strides[0] == 1
    for job in range(first, last):
        group, start = job // blocks, job % blocks * block
        row, rows, matrix = groups[group]
        count = min(block, columns - start)
        b = matrix + size * start * strides[1]
        to = out + 4 * (row * columns + start)
        if by_rows:
            _by_rows(a + 4 * row * width, rows, b, strides[1], size, count, width, to, columns, kind)
        else:
            _by_columns(a + 4 * row * width, rows, b, strides[0], size, count, width, to, columns, kind)


def _multiply_shared(
    bounds: Any,
    groups: Any,
    block: int,
    a: int,
    width: int,
    columns: int,
    strides: Any,
    size: int,
    out: int,
    kind: Any,
) -> None:
    for share in prange(len(bounds) - 1):
        multiply(bounds[share], bounds[share + 1], groups, block, a, width, columns, strides, size, out, kind)


multiply_shared = compiled(
    _multiply_shared, parallel=True
)  # jobs from bounds[i] to bounds[i + 1] - 1 by one thread each
