"""Gradients of matrices: rows of an expert, transposed, times other rows of it (clauses D1, D2)."""

import triton
import triton.language as tl

from executors._triton.kernels.addresses import offset
from executors._triton.kernels.precision import rounded


@triton.jit
def load_rows(pointer, strides, slots, rows, mask, columns, N, topk_weights, TOP_K, SCALED):
    """[rows, columns] of a or b: of the slots' tokens where TOP_K, times the slots' weights where SCALED."""
    sources = slots // TOP_K if TOP_K else rows
    offsets = offset(sources, strides[0])[:, None] + offset(columns, strides[1])[None, :]
    values = tl.load(pointer + offsets, mask=mask[:, None] & (columns < N)[None, :], other=0.0)
    if SCALED:
        scale = tl.load(topk_weights + slots, mask=mask, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) * scale[:, None]).to(values.dtype)
    return values


@triton.jit
def outer_kernel(
    a,  # [T, M] where TOP_K_A, else [S, M] sorted by expert
    b,  # [T, N] where TOP_K_B, else [S, N] sorted by expert
    a_powers,  # [E, M] by which columns of a were divided, or None
    b_powers,  # [E, N] by which columns of b were divided, or None
    topk_weights,  # [S], read where one of the two is SCALED
    order,  # [S] the slot of each row
    group_offsets,  # [E + 1]
    out,  # [E, M, N] out
    M,
    N,
    a_strides,
    b_strides,
    out_strides,
    TOP_K_A: tl.constexpr,
    TOP_K_B: tl.constexpr,
    SCALED_A: tl.constexpr,
    SCALED_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows at a time
    GROUP_M: tl.constexpr,
):
    """a^T b, summed over each expert's rows in order; exactly 0 for an expert without rows."""
    num_row_tiles, num_column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (num_row_tiles * num_column_tiles)
    tile = tl.program_id(0) % (num_row_tiles * num_column_tiles)
    per_group = GROUP_M * num_column_tiles
    first = tile // per_group * GROUP_M
    height = tl.minimum(num_row_tiles - first, GROUP_M)
    ms = (first + tile % per_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tile % per_group // height * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(group_offsets + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(tl.load(group_offsets + expert), end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        mask = rows < end
        slots = tl.load(order + tl.minimum(rows, end - 1))
        of_a = load_rows(a, a_strides, slots, rows, mask, ms, M, topk_weights, TOP_K_A, SCALED_A)
        of_b = load_rows(b, b_strides, slots, rows, mask, ns, N, topk_weights, TOP_K_B, SCALED_B)
        of_a, of_b = rounded(of_a, PRECISION), rounded(of_b, PRECISION)
        total = tl.dot(tl.trans(of_a), of_b, total, input_precision=PRECISION)
    if a_powers is not None:
        total *= tl.load(a_powers + offset(expert, M) + ms, mask=ms < M, other=1.0)[:, None]
    if b_powers is not None:
        total *= tl.load(b_powers + offset(expert, N) + ns, mask=ns < N, other=1.0)[None, :]
    offsets = offset(expert, out_strides[0]) + offset(ms, out_strides[1])[:, None] + offset(ns, out_strides[2])[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])
