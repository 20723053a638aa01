"""The first factor of an adapter (clause E6); the second is part of the products."""

import triton
import triton.language as tl

from executors._triton.kernels.addresses import offset
from executors._triton.kernels.products import dot_exact, load_dense
from executors._triton.kernels.tiles import tile_at


@triton.jit
def inner_kernel(
    rows_of,  # [T, K] where TOP_K, else [S, K] sorted by expert
    powers,  # [S] by which rows were divided, or None
    factor,  # [E, R, K], any float dtype
    order,  # [S] the slot of each row, read where TOP_K
    tiles,  # [1 + tiles, 3] from kernels.grouping
    out,  # [S, R] out, rows sorted by expert
    R,
    K,
    scaling,
    row_strides,
    factor_strides,
    TOP_K: tl.constexpr,  # 0 for rows that are sorted already
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Rows times their expert's factor, transposed, times the adapter's scaling."""
    num_row_tiles = tl.load(tiles)
    num_column_tiles = tl.cdiv(R, BLOCK_R)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        expert, row, end, column_tile = tile_at(tile, tiles, num_row_tiles, num_column_tiles, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        within = tl.minimum(rows, end - 1)
        sources = tl.load(order + within) // TOP_K if TOP_K else within
        starts = offset(sources, row_strides[0])[:, None]
        rs = column_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            offsets = starts + offset(ks, row_strides[1])[None, :]
            a = tl.load(rows_of + offsets) if EVEN_K else tl.load(rows_of + offsets, mask=(ks < K)[None, :], other=0.0)
            b = load_dense(factor, factor_strides, expert, rs, ks, (R, K), EVEN_K)
            total = dot_exact(a, b, total, PRECISION)
        if powers is not None:
            total *= tl.load(powers + within)[:, None]
        offsets = offset(rows, R)[:, None] + rs[None, :]
        mask = (rows < end)[:, None] & (rs < R)[None, :]
        tl.store(out + offsets, (total * scaling).to(out.dtype.element_ty), mask=mask)
