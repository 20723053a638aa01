"""Kernels that Numba compiles: a few rows of each expert times its matrix, and that matrix' gradient.

Tensors are passed by the address of their first number and their strides in numbers. 16-bit numbers are widened in
registers. A job is a block of one group's result. It is computed in an order that depends on sizes only, so how jobs
are shared out among threads changes no bit. Sums are fp32 (E2).

All of it is one file: what Numba keeps on disk is compiled anew when a kernel's own file changes, not another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from platform import machine
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

WIDTH = 16  # rows of a matrix in 4 bits that are decoded at a time, where they are summed over
ROWS, COLUMNS = 8, 512  # of a gradient at a time: its sums stay in the first cache
ZERO = np.float32(0.0)
# A number whose type names the dtype of matrices.
KINDS = {"bfloat16": np.uint16(0), "float16": np.int16(0), "float32": np.float32(0)}

# Instructions that look up 16 bytes in a table of 16, by processor.
LOOK_UP = {"x86_64": "llvm.x86.ssse3.pshuf.b.128", "amd64": "llvm.x86.ssse3.pshuf.b.128"}
LOOK_UP |= dict.fromkeys(("aarch64", "arm64"), "llvm.aarch64.neon.tbl1.v16i8")

I8, I16, I32, I64, FP16, FP32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)
STORED = {types.uint16: I16, types.int16: FP16, types.float32: FP32}


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


def _place(builder: Any, args: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(args[0], STORED[kind].as_pointer()), [args[1]])


def _operands(builder: Any) -> Any:
    """What tells LLVM that operands are not written, so that it need not look whether memory overlaps."""
    domain = builder.module.add_metadata(["moe_ref"])
    return builder.module.add_metadata([builder.module.add_metadata(["moe_ref operands", domain])])


@intrinsic
def operand(_context: Any, address: Any, index: Any, kind: Any) -> Any:
    """The number at an index, widened to fp32: bf16, fp16 or fp32, by the type of ``kind``. No kernel writes there."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        number = builder.load(_place(builder, args, kind))
        number.set_metadata("alias.scope", _operands(builder))
        if kind == types.uint16:  # the upper half of an fp32 number
            return builder.bitcast(builder.shl(builder.zext(number, I32), ir.Constant(I32, 16)), FP32)
        return builder.fpext(number, FP32) if kind == types.int16 else number

    return types.float32(types.int64, types.int64, kind), generate


@intrinsic
def partial(_context: Any, address: Any, index: Any) -> Any:
    """The fp32 number at an index, a partial sum."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(_place(builder, args, types.float32))

    return types.float32(types.int64, types.int64), generate


def _rounded(builder: Any, number: Any, kind: Any) -> Any:
    """fp32 numbers rounded to nearest, ties to even, to bf16, fp16 or fp32: one, or a vector."""
    lanes = getattr(number.type, "count", 0)

    def of(element: Any) -> Any:
        return ir.VectorType(element, lanes) if lanes else element

    def bits_of(value: int) -> Any:
        return ir.Constant(of(I32), [value] * lanes if lanes else value)

    if kind == types.uint16:
        bits = builder.bitcast(number, of(I32))
        odd = builder.and_(builder.lshr(bits, bits_of(16)), bits_of(1))
        rounded = builder.add(bits, builder.add(odd, bits_of(0x7FFF)))
        quiet = builder.or_(bits, bits_of(0x400000))  # a NaN stays one
        is_nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), bits_of(16)), of(I16))
    return builder.fptrunc(number, of(FP16)) if kind == types.int16 else number


@intrinsic
def write(_context: Any, address: Any, index: Any, value: Any, kind: Any) -> Any:
    """Writes an fp32 number at an index, rounded by the type of ``kind``."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        stored = builder.store(_rounded(builder, args[2], kind), _place(builder, args, kind))
        stored.set_metadata("noalias", _operands(builder))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, kind), generate


@intrinsic
def table_of(_context: Any, values: Any, scale: Any, kind: Any) -> Any:
    """16 fp32 numbers times a scale, rounded to 16 bits: their lower bytes, then the upper ones, in four words."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = builder.load(builder.inttoptr(args[0], ir.VectorType(FP32, 16).as_pointer()), align=4)
        numbers.set_metadata("alias.scope", _operands(builder))
        same = ir.Constant(ir.VectorType(I32, 16), [0] * 16)
        one = builder.insert_element(ir.Constant(numbers.type, ir.Undefined), args[1], ir.Constant(I32, 0))
        products = builder.fmul(numbers, builder.shuffle_vector(one, one, same))
        pairs = builder.bitcast(_rounded(builder, products, kind), ir.VectorType(I8, 32))
        words = [
            builder.extract_element(
                builder.bitcast(_pick(builder, pairs, pairs, range(half, 32, 2)), ir.VectorType(I64, 2)),
                ir.Constant(I32, word),
            )
            for half in (0, 1)
            for word in (0, 1)
        ]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.int64, 4)(types.int64, types.float32, kind), generate


@intrinsic
def decode_32(_context: Any, codes: Any, table: Any, out: Any, low_first: Any) -> Any:
    """Writes what the 32 codes in 16 bytes stand for, by a table of `table_of`."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bytes_, numbers = ir.VectorType(I8, 16), ir.VectorType(I16, 16)
        takes = ir.FunctionType(bytes_, [bytes_, bytes_])
        look_up = builder.module.declare_intrinsic(LOOK_UP[machine().lower()], fnty=takes)
        words = cgutils.unpack_tuple(builder, args[1], 4)
        halves = []
        for half in (0, 2):
            pair = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
            for place in (0, 1):
                pair = builder.insert_element(pair, words[half + place], ir.Constant(I32, place))
            halves.append(builder.bitcast(pair, bytes_))
        both = builder.load(builder.inttoptr(args[0], bytes_.as_pointer()), align=1)
        both.set_metadata("alias.scope", _operands(builder))
        high = builder.lshr(both, ir.Constant(bytes_, [4] * 16))
        low = builder.and_(both, ir.Constant(bytes_, [15] * 16))
        nibbles = builder.select(args[3], low, high), builder.select(args[3], high, low)
        found = []
        for nibble in nibbles:
            lower, upper = (builder.call(look_up, [half, nibble]) for half in halves)
            found.append(builder.bitcast(_pick(builder, lower, upper, _in_turn(16)), numbers))
        decoded = _pick(builder, *found, _in_turn(16))
        stored = builder.store(decoded, builder.inttoptr(args[2], decoded.type.as_pointer()))
        stored.align = 2
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, 4), types.int64, types.boolean), generate


def _pick(builder: Any, one: Any, other: Any, places: Iterable[int]) -> Any:
    """The elements of two vectors, counted on from the first to the second, in a new order."""
    order = list(places)
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(order)), order))


def _in_turn(count: int) -> list[int]:
    """One element of each of two vectors after the other."""
    return [place + count * which for place in range(count) for which in (0, 1)]


@compiled
def _decode(
    count: int, codes: int, scales: int, blocksize: int, values: int, low_first: bool, out: int, kind: Any
) -> None:
    """out [count], in 16 bits, from whole blocks of codes (Q1, Q2, M1).

    Each block has a table of its own: the format's 16 ``values`` times its scale, products in fp32, rounded once.
    """
    for block in range(count // blocksize):
        table = table_of(values, operand(scales, block, ZERO), kind)
        for i in range(block * blocksize, (block + 1) * blocksize, 32):
            decode_32(codes + i // 2, table, out + 2 * i, low_first)


@compiled
def _one_row(count: int, a: int, b0: int, b1: int, b2: int, b3: int, kind: Any) -> tuple[float, ...]:
    s0 = s1 = s2 = s3 = ZERO
    for k in range(count):
        x = operand(a, k, ZERO)
        s0 += x * operand(b0, k, kind)
        s1 += x * operand(b1, k, kind)
        s2 += x * operand(b2, k, kind)
        s3 += x * operand(b3, k, kind)
    return s0, s1, s2, s3


@compiled
def _two_rows(count: int, a0: int, a1: int, b0: int, b1: int, b2: int, b3: int, kind: Any) -> tuple[float, ...]:
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = ZERO
    for k in range(count):
        x0, x1 = operand(a0, k, ZERO), operand(a1, k, ZERO)
        y0, y1, y2, y3 = operand(b0, k, kind), operand(b1, k, kind), operand(b2, k, kind), operand(b3, k, kind)
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
        x0, x1, x2, x3 = operand(a0, k, ZERO), operand(a1, k, ZERO), operand(a2, k, ZERO), operand(a3, k, ZERO)
        y0, y1, y2 = operand(b0, k, kind), operand(b1, k, kind), operand(b2, k, kind)
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
                write(o0, j, s[0], ZERO)
                write(o0, j1, s[1], ZERO)
                write(o0, j2, s[2], ZERO)
                write(o1, j, s[3], ZERO)
                write(o1, j1, s[4], ZERO)
                write(o1, j2, s[5], ZERO)
                write(o2, j, s[6], ZERO)
                write(o2, j1, s[7], ZERO)
                write(o2, j2, s[8], ZERO)
                write(o3, j, s[9], ZERO)
                write(o3, j1, s[10], ZERO)
                write(o3, j2, s[11], ZERO)
            row += 4
        else:
            for j in range(0, columns, 4):
                j1, j2, j3 = min(j + 1, end), min(j + 2, end), min(j + 3, end)
                b0, b1 = b + size * pitch * j, b + size * pitch * j1
                b2, b3 = b + size * pitch * j2, b + size * pitch * j3
                if left == 2:
                    s = _two_rows(width, a0, a1, b0, b1, b2, b3, kind)
                    write(o1, j, s[4], ZERO)
                    write(o1, j1, s[5], ZERO)
                    write(o1, j2, s[6], ZERO)
                    write(o1, j3, s[7], ZERO)
                    write(o0, j, s[0], ZERO)
                    write(o0, j1, s[1], ZERO)
                    write(o0, j2, s[2], ZERO)
                    write(o0, j3, s[3], ZERO)
                else:
                    t = _one_row(width, a0, b0, b1, b2, b3, kind)
                    write(o0, j, t[0], ZERO)
                    write(o0, j1, t[1], ZERO)
                    write(o0, j2, t[2], ZERO)
                    write(o0, j3, t[3], ZERO)
            row += 2


@compiled
def _add_one(count: int, out: int, a: int, b: int, kind: Any) -> None:
    """out [count] plus a [1] times b [1, count]."""
    x = operand(a, 0, ZERO)
    for j in range(count):
        write(out, j, partial(out, j) + x * operand(b, j, kind), ZERO)


@compiled
def _add_four(count: int, out: int, a: int, along: int, b: int, pitch: int, kind: Any) -> None:
    """out [count] plus a [4] times b [4, count]."""
    b1, b2, b3 = b + pitch, b + 2 * pitch, b + 3 * pitch
    x0, x1 = operand(a, 0, ZERO), operand(a, along, ZERO)
    x2, x3 = operand(a, 2 * along, ZERO), operand(a, 3 * along, ZERO)
    for j in range(count):
        s = partial(out, j) + x0 * operand(b, j, kind) + x1 * operand(b1, j, kind)
        write(out, j, s + x2 * operand(b2, j, kind) + x3 * operand(b3, j, kind), ZERO)


@compiled
def _add_sixteen(
    count: int, out: int, stride: int, a: int, across: int, along: int, b: int, pitch: int, kind: Any
) -> None:
    """out [4, count] plus a [4, 4] times b [4, count]."""
    b1, b2, b3 = b + pitch, b + 2 * pitch, b + 3 * pitch
    o1, o2, o3 = out + 4 * stride, out + 8 * stride, out + 12 * stride
    w1, w2, w3 = a + 4 * across, a + 8 * across, a + 12 * across
    k1, k2, k3 = along, 2 * along, 3 * along
    x0, x1, x2, x3 = operand(a, 0, ZERO), operand(a, k1, ZERO), operand(a, k2, ZERO), operand(a, k3, ZERO)
    y0, y1, y2, y3 = operand(w1, 0, ZERO), operand(w1, k1, ZERO), operand(w1, k2, ZERO), operand(w1, k3, ZERO)
    z0, z1, z2, z3 = operand(w2, 0, ZERO), operand(w2, k1, ZERO), operand(w2, k2, ZERO), operand(w2, k3, ZERO)
    u0, u1, u2, u3 = operand(w3, 0, ZERO), operand(w3, k1, ZERO), operand(w3, k2, ZERO), operand(w3, k3, ZERO)
    for j in range(count):
        c0, c1, c2, c3 = operand(b, j, kind), operand(b1, j, kind), operand(b2, j, kind), operand(b3, j, kind)
        write(out, j, partial(out, j) + x0 * c0 + x1 * c1 + x2 * c2 + x3 * c3, ZERO)
        write(o1, j, partial(o1, j) + y0 * c0 + y1 * c1 + y2 * c2 + y3 * c3, ZERO)
        write(o2, j, partial(o2, j) + z0 * c0 + z1 * c1 + z2 * c2 + z3 * c3, ZERO)
        write(o3, j, partial(o3, j) + u0 * c0 + u1 * c1 + u2 * c2 + u3 * c3, ZERO)


@compiled
def _clear(rows: int, columns: int, out: int, stride: int) -> None:
    for row in range(rows):
        for j in range(columns):
            write(out, row * stride + j, ZERO, ZERO)


@compiled
def _by_columns(
    a: int,
    rows: int,
    across: int,
    along: int,
    b: int,
    pitch: int,
    size: int,
    columns: int,
    width: int,
    out: int,
    stride: int,
    kind: Any,
) -> None:
    """Adds to out [rows, columns] a [rows, width] times b [width, columns], whose rows pass by once, four at a time.

    Numbers of a lie ``across`` apart from row to row and ``along`` apart within one.
    """
    whole, four, step = width - width % 4, rows - rows % 4, size * pitch
    for k in range(0, whole, 4):
        for row in range(0, four, 4):
            at, to = a + 4 * (row * across + k * along), out + 4 * row * stride
            _add_sixteen(columns, to, stride, at, across, along, b + step * k, step, kind)
        for row in range(four, rows):
            at, to = a + 4 * (row * across + k * along), out + 4 * row * stride
            _add_four(columns, to, at, along, b + step * k, step, kind)
    for k in range(whole, width):
        for row in range(rows):
            _add_one(columns, out + 4 * row * stride, a + 4 * (row * across + k * along), b + step * k, kind)


@compiled
def multiply(
    first: int,
    last: int,
    groups: Any,
    block: int,
    a: int,
    width: int,
    columns: int,
    along: int,
    across: int,
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
        along: stride of the matrices along the width, in numbers.
        across: stride along the columns; one of the two is 1.
        size: bytes of a matrix' number.
        out: address of fp32 numbers, contiguous; only rows of the groups are written.
        kind: of `KINDS`.
    """
    blocks = -(-columns // block)
    by_rows = along == 1
    for job in range(first, last):
        group, start = job // blocks, job % blocks * block
        row, rows, matrix = groups[group]
        count = min(block, columns - start)
        b = matrix + size * start * across
        to = out + 4 * (row * columns + start)
        if by_rows:
            _by_rows(a + 4 * row * width, rows, b, across, size, count, width, to, columns, kind)
        else:
            _clear(rows, count, to, columns)
            _by_columns(a + 4 * row * width, rows, width, 1, b, along, size, count, width, to, columns, kind)


def _multiply_shared(bounds: Any, given: Any) -> None:
    """Jobs from bounds[i] to bounds[i + 1] - 1 by one thread each."""
    for share in prange(len(bounds) - 1):
        multiply(bounds[share], bounds[share + 1], *given)


multiply_shared = compiled(_multiply_shared, parallel=True)


@compiled
def multiply_decoded(
    first: int,
    last: int,
    groups: Any,
    block: int,
    a: int,
    width: int,
    columns: int,
    by_rows: bool,
    blocksize: int,
    values: int,
    low_first: bool,
    out: int,
    kind: Any,
) -> None:
    """`multiply` with matrices in 4 bits, of which a job decodes what it needs, a little at a time, into 16 bits.

    Args:
        first: of the jobs; a group has one for each block of columns.
        last: the job past the last one.
        groups: [G, 4] int64: the first row, the number of rows, the addresses of the matrix' codes and of its scales.
        block: columns of a job; every job begins with a block of codes.
        a: address of fp32 numbers, contiguous.
        width: numbers that are summed over.
        columns: of the result.
        by_rows: whether codes are stored along the width; else along the columns.
        blocksize: codes with one scale.
        values: address of the 16 fp32 numbers that codes stand for.
        low_first: whether the low half of a byte is its first code.
        out: address of fp32 numbers, contiguous; only rows of the groups are written.
        kind: of `KINDS`, of what codes are decoded to.
    """
    blocks = -(-columns // block)
    room = np.empty(block * (width if by_rows else WIDTH), dtype=np.uint16)
    matrix = room.ctypes.data
    for job in range(first, last):
        group, start = job // blocks, job % blocks * block
        row, rows, codes, scales = groups[group]
        count = min(block, columns - start)
        own, to = a + 4 * row * width, out + 4 * (row * columns + start)
        if by_rows:
            at = start * width
            _decode(
                count * width,
                codes + at // 2,
                scales + 4 * (at // blocksize),
                blocksize,
                values,
                low_first,
                matrix,
                kind,
            )
            _by_rows(own, rows, matrix, width, 2, count, width, to, columns, kind)
            continue
        _clear(rows, count, to, columns)
        for k in range(0, width, WIDTH):
            high = min(WIDTH, width - k)
            for h in range(high):
                at = (k + h) * columns + start
                _decode(
                    count,
                    codes + at // 2,
                    scales + 4 * (at // blocksize),
                    blocksize,
                    values,
                    low_first,
                    matrix + 2 * h * count,
                    kind,
                )
            _by_columns(own + 4 * k, rows, width, 1, matrix, count, 2, count, high, to, columns, kind)


def _multiply_decoded_shared(bounds: Any, given: Any) -> None:
    for share in prange(len(bounds) - 1):
        multiply_decoded(bounds[share], bounds[share + 1], *given)


multiply_decoded_shared = compiled(_multiply_decoded_shared, parallel=True)


@compiled
def add_outer(
    first: int,
    last: int,
    groups: Any,
    block: int,
    a: int,
    height: int,
    b: int,
    width: int,
    size: int,
    kind: Any,
) -> None:
    """Jobs of out [height, width] = aᵀ b for each group of rows of a [S, height] and b [S, width].

    Args:
        first: of the jobs; a group has one for each block of rows of its result.
        last: the job past the last one.
        groups: [G, 3] int64: the first row, the number of rows, the address of the result, contiguous.
        block: rows of the result in a job.
        a: address of fp32 numbers, contiguous.
        height: numbers of a row of a.
        b: address of fp32 numbers, contiguous.
        width: numbers of a row of b.
        size: bytes of a number of the result.
        kind: of `KINDS`, of the result.
    """
    blocks = -(-height // block)
    room = np.empty(ROWS * COLUMNS, dtype=np.float32)
    sums = room.ctypes.data
    for job in range(first, last):
        group, start = job // blocks, job % blocks * block
        row, rows, out = groups[group]
        for i in range(start, min(start + block, height), ROWS):
            high = min(ROWS, height - i)
            for left in range(0, width, COLUMNS):
                wide = min(COLUMNS, width - left)
                own, other = a + 4 * (row * height + i), b + 4 * (row * width + left)
                _clear(high, wide, sums, COLUMNS)
                _by_columns(own, high, 1, height, other, width, 4, wide, rows, sums, COLUMNS, ZERO)
                for h in range(high):
                    to = out + size * ((i + h) * width + left)
                    for j in range(wide):
                        write(to, j, partial(sums, h * COLUMNS + j), kind)


def _add_outer_shared(bounds: Any, given: Any) -> None:
    for share in prange(len(bounds) - 1):
        add_outer(bounds[share], bounds[share + 1], *given)


add_outer_shared = compiled(_add_outer_shared, parallel=True)
