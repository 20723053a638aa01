"""Grouped products: rows sorted by expert times that expert's matrix (clauses E1, E2).

Programs are persistent: each takes every n-th tile of a list that `kernels.grouping` wrote, so groups of any sizes keep
all of them busy. Sums are in fp32, over k in increasing order.
"""

import triton
import triton.language as tl

from executors._triton.kernels.activation import act, gated
from executors._triton.kernels.addresses import offset
from executors._triton.kernels.narrow import inverse_of
from executors._triton.kernels.packed import load_packed
from executors._triton.kernels.tiles import part_of, tile_at


@triton.jit
def load_matrix(w, scales, expert, columns, first, k, N, K, strides, FORM, DTYPE, EVEN_K, BLOCK_N, BLOCK_K, TMA):
    """[BLOCK_K, BLOCK_N] of an expert's matrix [N, K], transposed; zeros outside.

    Either w is a pointer, and ``columns`` say which of the N; or by TMA a descriptor of [E, N, K] ("rows") or of
    [E, K, N] ("columns"), and BLOCK_N of them are taken from ``first`` on; or with FORM they are codes in 4 bits, whose
    numbers are rounded to DTYPE; outside are any numbers then, and the other operand has zeros.
    """
    if FORM is not None:
        values = load_packed(w, scales, expert, columns, first, k, N, K, strides, FORM, BLOCK_N, BLOCK_K).to(DTYPE)
    elif TMA == "rows":
        values = w.load([expert, first, k]).reshape(BLOCK_N, BLOCK_K).T
    elif TMA == "columns":
        values = w.load([expert, k, first]).reshape(BLOCK_K, BLOCK_N)
    else:
        ks = k + tl.arange(0, BLOCK_K)
        places = offset(expert, strides[0]) + offset(columns, strides[1])[None, :] + offset(ks, strides[2])[:, None]
        mask = (columns < N)[None, :] if EVEN_K else (columns < N)[None, :] & (ks < K)[:, None]
        values = tl.load(w + places, mask=mask, other=0.0)
    return values


@triton.jit
def load_bias(bias, expert, columns, N, stride_be, stride_bn):
    """[1, BLOCK_N] in fp32."""
    places = offset(expert, stride_be) + offset(columns, stride_bn)
    return tl.load(bias + places, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def dot_exact(a, b, total, PRECISION):
    """total + a b, where b has any float dtype and is read exactly.

    Beside bf16 a wider one is three terms in bf16, if it is finite there; beside others both are widened to fp32.
    """
    if a.dtype == b.dtype:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    elif a.dtype == tl.bfloat16:
        rest = b.to(tl.float32)
        for _ in tl.static_range(3):
            part = rest.to(tl.bfloat16)
            rest -= part.to(tl.float32)
            total = tl.dot(a, part, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def add_adapter(
    total, inner, powers, factor, expert, row, end, columns, N, R, strides, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
):
    """total + inner F^T: what an adapter adds to rows of an expert; inner [S, R], F [E, N, R] (clause E6).

    Rows of inner that were divided by powers of two, if there are any, meet a total that is divided too (E7).
    """
    own = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
    rows = offset(own, R)[:, None]
    if powers is not None:
        power = tl.load(powers + own)[:, None]
        total *= inverse_of(power)
    for r in tl.range(0, R, BLOCK_R):
        rs = r + tl.arange(0, BLOCK_R)
        a = tl.load(inner + rows + rs[None, :], mask=(rs < R)[None, :], other=0.0)
        b = load_matrix(factor, (), expert, columns, 0, r, N, R, strides, None, a.dtype, False, BLOCK_N, BLOCK_R, "")
        total = dot_exact(a, b, total, PRECISION)
    if powers is not None:
        total *= power
    return total


@triton.jit(do_not_specialize=["first_expert", "last_expert"])
def up_kernel(
    x,  # [T, H]
    w,  # [E, N, H], N = 2I if gated, else I; or a descriptor of it, or codes of it in 4 bits
    scales,  # of codes, else empty
    bias,  # [E, N], or anything where HAS_BIAS is False
    topk_weights,  # [S], read where SCALE_INPUT
    inner,  # [S, R] rows times the adapter's first factor, read where BLOCK_R
    inner_powers,  # [S] by which its rows were divided, or None
    factor,  # [E, N, R] the adapter's second factor, read where BLOCK_R
    order,  # [S] the slot of each row
    tiles,  # [1 + tiles, 3] from kernels.grouping
    bounds,  # [E + 1] where each expert's row tiles begin, read where PART
    first_expert,  # of those whose matrices w holds: 0, or where PART another one
    last_expert,  # the first one after them, read where PART
    h,  # [S, I] out, rows sorted by expert
    z,  # [S, N] out where STORE_Z
    N,
    K,
    R,
    stride_xt,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    stride_fe,
    stride_fn,
    stride_fr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    STORE_Z: tl.constexpr,
    LAYOUT: tl.constexpr,  # "concatenated", "interleaved", or "" for no gate
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LATE: tl.constexpr,  # whether LIMIT clamps what comes after the activation
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PART: tl.constexpr,
    FORM: tl.constexpr,  # of codes, or None
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of w in a tile, gate and up together
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of the adapter's rank, or 0 without one
    GROUP_M: tl.constexpr,
):
    """h = act(z), z = x W^T + b, the rows of x gathered as they are read; and an adapter's part beside W."""
    BLOCK_H: tl.constexpr = BLOCK_N if LAYOUT == "" else BLOCK_N // 2  # columns of h in a tile
    BLOCK_W: tl.constexpr = BLOCK_H if LAYOUT == "concatenated" else BLOCK_N  # of w that one load takes
    width = N if LAYOUT == "" else N // 2
    strides = (stride_we, stride_wn, stride_wk)
    of_factor = (stride_fe, stride_fn, stride_fr)
    tiles, num_row_tiles = part_of(tiles, bounds, first_expert, last_expert, PART)
    num_column_tiles = tl.cdiv(width, BLOCK_H)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        expert, row, end, column_tile = tile_at(tile, tiles, num_row_tiles, num_column_tiles, GROUP_M)
        matrix = expert - first_expert
        rows = row + tl.arange(0, BLOCK_M)
        slots = tl.load(order + tl.minimum(rows, end - 1))  # what is past the end is a copy, and not stored
        x_rows = offset(slots // TOP_K, stride_xt)[:, None]
        first = column_tile * BLOCK_W
        columns = first + tl.arange(0, BLOCK_W)
        others = columns + width  # ups, where columns are gates
        limit = width if LAYOUT == "concatenated" else N
        bound = limit if FORM is None else N  # codes past the gates are ups, and not stored
        total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
        up = total  # the second half, of a concatenated layout only
        for k in tl.range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            places = x_rows + offset(ks, stride_xk)[None, :]
            a = tl.load(x + places) if EVEN_K else tl.load(x + places, mask=(ks < K)[None, :], other=0.0)
            b = load_matrix(
                w, scales, matrix, columns, first, k, bound, K, strides, FORM, a.dtype, EVEN_K, BLOCK_W, BLOCK_K, TMA
            )
            total = tl.dot(a, b, total, input_precision=PRECISION)
            if LAYOUT == "concatenated":
                start = first + width
                c = load_matrix(
                    w, scales, matrix, others, start, k, N, K, strides, FORM, a.dtype, EVEN_K, BLOCK_W, BLOCK_K, TMA
                )
                up = tl.dot(a, c, up, input_precision=PRECISION)
        if BLOCK_R:
            total = add_adapter(
                total,
                inner,
                inner_powers,
                factor,
                expert,
                row,
                end,
                columns,
                limit,
                R,
                of_factor,
                PRECISION,
                BLOCK_M,
                BLOCK_W,
                BLOCK_R,
            )
            if LAYOUT == "concatenated":
                up = add_adapter(
                    up,
                    inner,
                    inner_powers,
                    factor,
                    expert,
                    row,
                    end,
                    others,
                    N,
                    R,
                    of_factor,
                    PRECISION,
                    BLOCK_M,
                    BLOCK_W,
                    BLOCK_R,
                )
        if SCALE_INPUT:
            scale = tl.load(topk_weights + slots).to(tl.float32)[:, None]
            total *= scale
            up *= scale
        if HAS_BIAS:
            total += load_bias(bias, expert, columns, limit, stride_be, stride_bn)
            if LAYOUT == "concatenated":
                up += load_bias(bias, expert, others, N, stride_be, stride_bn)
        there = (rows < end)[:, None]
        if STORE_Z:
            z_rows = z + offset(row, N) + (tl.arange(0, BLOCK_M) * N)[:, None]
            tl.store(z_rows + columns[None, :], total.to(z.dtype.element_ty), mask=there & (columns < limit)[None, :])
            if LAYOUT == "concatenated":
                tl.store(z_rows + others[None, :], up.to(z.dtype.element_ty), mask=there & (others < N)[None, :])
        if LAYOUT == "":
            value = act(total, ACTIVATION, ALPHA)
        elif LAYOUT == "concatenated":
            value = gated(total, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET, LATE, GATE_SOFTCAP, UP_SOFTCAP)
        else:
            even, odd = tl.split(total.reshape(BLOCK_M, BLOCK_H, 2))
            value = gated(even, odd, ACTIVATION, ALPHA, LIMIT, UP_OFFSET, LATE, GATE_SOFTCAP, UP_SOFTCAP)
        out = column_tile * BLOCK_H + tl.arange(0, BLOCK_H)
        places = offset(rows, width)[:, None] + out[None, :]
        tl.store(h + places, value.to(h.dtype.element_ty), mask=there & (out < width)[None, :])


@triton.jit(do_not_specialize=["first_expert", "last_expert"])
def down_kernel(
    h,  # [S, K] rows sorted by expert, or a descriptor of it
    h_powers,  # [S] by which they were divided, or None
    w,  # [E, N, K], or a descriptor of it, or codes of it in 4 bits
    scales,  # of codes, else empty
    bias,  # [E, N], or anything where HAS_BIAS is False
    topk_weights,  # [S], read where WEIGHTED
    inner,  # [S, R] rows times the adapter's first factor, read where BLOCK_R
    inner_powers,  # [S] by which its rows were divided, or None
    factor,  # [E, N, R] the adapter's second factor, read where BLOCK_R
    order,  # [S] the slot of each row
    tiles,  # [1 + tiles, 3] from kernels.grouping
    bounds,  # [E + 1] where each expert's row tiles begin, read where PART
    first_expert,  # of those whose matrices w holds: 0, or where PART another one
    last_expert,  # the first one after them, read where PART
    out,  # [S, N] out, each row at its slot
    N,
    K,
    R,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    stride_fe,
    stride_fn,
    stride_fr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PART: tl.constexpr,
    FORM: tl.constexpr,  # of codes, or None
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of the adapter's rank, or 0 without one
    GROUP_M: tl.constexpr,
):
    """The slots' (h W^T + b), and an adapter's part beside W, times the weight where WEIGHTED.

    Empty slots are not written.
    """
    strides = (stride_we, stride_wn, stride_wk)
    of_factor = (stride_fe, stride_fn, stride_fr)
    tiles, num_row_tiles = part_of(tiles, bounds, first_expert, last_expert, PART)
    num_column_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        expert, row, end, column_tile = tile_at(tile, tiles, num_row_tiles, num_column_tiles, GROUP_M)
        matrix = expert - first_expert
        rows = row + tl.arange(0, BLOCK_M)
        first = column_tile * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        h_rows = offset(tl.minimum(rows, end - 1), K)[:, None]
        o = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            if TMA != "":
                a = h.load([row, k])  # rows past the end are of other experts, or were never written: not stored
            elif EVEN_K:
                a = tl.load(h + h_rows + ks[None, :])
            else:
                a = tl.load(h + h_rows + ks[None, :], mask=(ks < K)[None, :], other=0.0)
            b = load_matrix(
                w, scales, matrix, columns, first, k, N, K, strides, FORM, a.dtype, EVEN_K, BLOCK_N, BLOCK_K, TMA
            )
            o = tl.dot(a, b, o, input_precision=PRECISION)
        if h_powers is not None:
            o *= tl.load(h_powers + tl.minimum(rows, end - 1))[:, None]
        if BLOCK_R:
            o = add_adapter(
                o,
                inner,
                inner_powers,
                factor,
                expert,
                row,
                end,
                columns,
                N,
                R,
                of_factor,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
            )
        slots = tl.load(order + tl.minimum(rows, end - 1))
        if HAS_BIAS:
            o += load_bias(bias, expert, columns, N, stride_be, stride_bn)
        if WEIGHTED:
            o *= tl.load(topk_weights + slots).to(tl.float32)[:, None]
        places = offset(slots, N)[:, None] + columns[None, :]
        tl.store(out + places, o.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (columns < N)[None, :])
