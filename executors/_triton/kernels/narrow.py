"""From fp32 to fp16 without overflow: rows or columns divided by powers of two (clause E7).

A row whose numbers are within the range is divided by 1, so what is added to its product needs no scaling. Every column
is divided by its own power, so small numbers do not become subnormal either.
"""

import triton
import triton.language as tl

from executors._triton.kernels.addresses import offset

LARGEST = tl.constexpr(65504.0)  # of fp16


@triton.jit
def power_of(largest):
    """The power of two that brings numbers of up to ``largest`` below 2**15; 1 if they are in fp16's range."""
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000  # 2**exponent
    power = (bits - (14 << 23)).to(tl.float32, bitcast=True)
    return tl.where(largest > LARGEST, power, 1.0)


@triton.jit
def power_of_columns(largest):
    """The power of two that brings numbers of up to ``largest`` between 2**14 and 2**15, or 1 for zeros."""
    bits = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 15 << 23)  # the power itself is no subnormal
    return tl.where(largest > 0, (bits - (14 << 23)).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def inverse_of(power):
    """1 / a power of two, exactly."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def narrow_rows_kernel(
    values,  # [S, N] fp32, rows sorted by expert
    group_offsets,  # [E + 1]
    out,  # [S, N] fp16 out
    powers,  # [S] fp32 out
    num_experts,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Divides each row by its power of two. Rows of no group are neither read nor written."""
    end = tl.load(group_offsets + num_experts)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    starts = offset(rows, N)[:, None]
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        largest = tl.maximum(largest, tl.abs(tl.load(values + starts + columns[None, :], mask=mask, other=0.0)))
    power = power_of(tl.max(largest, axis=1))
    inverse = inverse_of(power)[:, None]
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        block = tl.load(values + starts + columns[None, :], mask=mask, other=0.0) * inverse
        tl.store(out + starts + columns[None, :], block.to(out.dtype.element_ty), mask=mask)
    tl.store(powers + rows, power, mask=rows < end)


@triton.jit
def load_weighted(values, topk_weights, order, rows, end, columns, N, WEIGHTED):
    """[rows, columns] of values, times the weights of the rows' slots where WEIGHTED."""
    mask = (rows < end)[:, None] & (columns < N)[None, :]
    block = tl.load(values + offset(rows, N)[:, None] + columns[None, :], mask=mask, other=0.0)
    if WEIGHTED:
        slots = tl.load(order + rows, mask=rows < end, other=0)
        block *= tl.load(topk_weights + slots, mask=rows < end, other=0.0).to(tl.float32)[:, None]
    return block, mask


@triton.jit
def narrow_columns_kernel(
    values,  # [S, N] fp32, rows sorted by expert
    topk_weights,  # [S], read where WEIGHTED
    order,  # [S] the slot of each row, read where WEIGHTED
    group_offsets,  # [E + 1]
    out,  # [S, N] fp16 out
    powers,  # [E, N] fp32 out
    N,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Divides each column of each expert by its power of two; before that, weights multiply the rows where WEIGHTED."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(group_offsets + expert), tl.load(group_offsets + expert + 1)
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, end, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        block, _ = load_weighted(values, topk_weights, order, rows, end, columns, N, WEIGHTED)
        largest = tl.maximum(largest, tl.abs(block))
    power = power_of_columns(tl.max(largest, axis=0))
    inverse = inverse_of(power)[None, :]
    for row in range(start, end, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        block, mask = load_weighted(values, topk_weights, order, rows, end, columns, N, WEIGHTED)
        block *= inverse
        tl.store(out + offset(rows, N)[:, None] + columns[None, :], block.to(out.dtype.element_ty), mask=mask)
    tl.store(powers + offset(expert, N) + columns, power, mask=columns < N)
