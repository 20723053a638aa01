"""Grouped products: rows sorted by expert times that expert's matrix (clauses E1, E2).

Programs are persistent: each takes every n-th tile of the list from `kernels.grouping`, so groups of any sizes keep all
programs busy. Sums are in fp32, over k in increasing order.
"""

import triton
import triton.language as tl

from executors._triton.kernels.activation import act, gated
from executors._triton.kernels.addresses import offset
from executors._triton.kernels.narrow import inverse_of
from executors._triton.kernels.packed import load_packed
from executors._triton.kernels.precision import rounded
from executors._triton.kernels.scales import next_scales, no_scales
from executors._triton.kernels.tiles import part_of, tile_at


@triton.jit
def load_matrix(matrices, pointers, held, at, sizes, FORMAT, TMA, EVEN_K, BLOCK_N, BLOCK_K):
    """[BLOCK_K, BLOCK_N] of an expert's matrix [N, K], transposed; zeros outside.

    ``matrices`` are (w, scales, strides), ``at`` is (expert, columns, first column, first k), ``sizes`` are (N, K).
    ``pointers`` are those of `pointers_to`.
    By TMA w is a descriptor of [E, N, K] ("rows") or of [E, K, N] ("columns"). With FORMAT w holds codes in 4 bits: the
    result is in fp32, and outside are any numbers, which meet zeros of the other operand. Else w is a pointer.
    """
    w, _, strides = matrices
    expert, columns, first, k = at
    if FORMAT is not None:
        values = load_packed(matrices, held, at, sizes, FORMAT, EVEN_K, BLOCK_N, BLOCK_K)
    elif TMA == "rows":
        values = w.load([expert, first, k]).reshape(BLOCK_N, BLOCK_K).T
    elif TMA == "columns":
        values = w.load([expert, k, first]).reshape(BLOCK_K, BLOCK_N)
    else:
        ks = k + tl.arange(0, BLOCK_K)
        if pointers is None:
            values = load_dense(w, strides, expert, columns, ks, sizes, EVEN_K)
        else:
            pointers += offset(tl.full((1, 1), k, tl.int32), strides[2])
            values = tl.load(pointers, mask=mask_of(columns, ks, sizes, EVEN_K), other=0.0)
    return values


@triton.jit
def pointers_to(matrices, expert, columns, AHEAD, BLOCK_K):
    """[BLOCK_K, columns] pointers to the first k of an expert's matrix where AHEAD, else None.

    They are computed once for a tile. A step then adds one product in 64 bits to all of them.
    """
    w, _, strides = matrices
    pointers = None
    if AHEAD:
        pointers = w + offset(expert, strides[0]) + offset(columns, strides[1])[None, :]
        pointers += offset(tl.arange(0, BLOCK_K), strides[2])[:, None]
    return pointers


@triton.jit
def load_dense(w, strides, expert, columns, ks, sizes, EVEN_K):
    """[k, columns] of an expert's matrix [N, K], transposed; zeros outside. With EVEN_K no k is outside."""
    offsets = offset(expert, strides[0]) + offset(columns, strides[1])[None, :] + offset(ks, strides[2])[:, None]
    return tl.load(w + offsets, mask=mask_of(columns, ks, sizes, EVEN_K), other=0.0)


@triton.jit
def mask_of(columns, ks, sizes, EVEN_K):
    """[k, columns] Whether they lie in a matrix [N, K]; [1, columns] with EVEN_K."""
    N, K = sizes
    return (columns < N)[None, :] if EVEN_K else (columns < N)[None, :] & (ks < K)[:, None]


@triton.jit
def load_bias(bias, strides, expert, columns, N):
    """[1, BLOCK_N] in fp32."""
    offsets = offset(expert, strides[0]) + offset(columns, strides[1])
    return tl.load(bias + offsets, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def dot_exact(a, b, total, PRECISION):
    """total + a b, where b has any float dtype and is read exactly.

    If a is in bf16, a wider b is split into three terms in bf16, which are exact if b is finite there. Else both are
    widened to fp32.
    """
    if a.dtype == b.dtype:
        total = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), total, input_precision=PRECISION)
    elif a.dtype == tl.bfloat16:
        rest = b.to(tl.float32)
        for _ in tl.static_range(3):
            term = rest.to(tl.bfloat16)
            rest -= term.to(tl.float32)
            total = tl.dot(a, term, total)
    else:
        a, b = rounded(a.to(tl.float32), PRECISION), rounded(b.to(tl.float32), PRECISION)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def add_adapter(total, adapter, expert, sources, columns, N, R, PRECISION, BLOCK_R):
    """total + inner F^T: what an adapter adds to rows of an expert; inner [S, R], F [E, N, R] (clause E6).

    ``adapter`` is (inner, powers, F, strides of F). Where rows of inner were divided by powers of two, the total is
    divided by them before the sum and multiplied after it (E7).
    """
    inner, powers, factor, strides = adapter
    rows = offset(sources, R)[:, None]
    if powers is not None:
        power = tl.load(powers + sources)[:, None]
        total *= inverse_of(power)
    for r in tl.range(0, R, BLOCK_R):
        rs = r + tl.arange(0, BLOCK_R)
        a = tl.load(inner + rows + rs[None, :], mask=(rs < R)[None, :], other=0.0)
        b = load_dense(factor, strides, expert, columns, rs, (N, R), False)
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
    inner_powers,  # [S] by which rows of inner were divided, or None
    factor,  # [E, N, R] the adapter's second factor, read where BLOCK_R
    order,  # [S] the slot of each row
    tiles,  # [1 + tiles, 3] from kernels.grouping
    bounds,  # [E + 1] where each expert's row tiles begin, read where PART
    first_expert,  # the first one in w: 0, or where PART any
    last_expert,  # the first one after those in w, read where PART
    h,  # [S, I] out, rows sorted by expert
    z,  # [S, N] out where STORE_Z
    N,
    K,
    R,
    x_strides,
    w_strides,  # of codes, bytes
    bias_strides,
    factor_strides,
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
    FORMAT: tl.constexpr,  # of codes, or None
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,  # whether pointers to w are computed before the loop over k
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of w in a tile, gate and up together
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of the adapter's rank, or 0 without one
    GROUP_M: tl.constexpr,
):
    """h = act(z), z = x W^T + b, plus an adapter's part. Rows of x are gathered as they are read."""
    BLOCK_H: tl.constexpr = BLOCK_N if LAYOUT == "" else BLOCK_N // 2  # columns of h in a tile
    BLOCK_W: tl.constexpr = BLOCK_H if LAYOUT == "concatenated" else BLOCK_N  # of w that one load takes
    width = N if LAYOUT == "" else N // 2
    tiles, num_row_tiles = part_of(tiles, bounds, first_expert, last_expert, PART)
    num_column_tiles = tl.cdiv(width, BLOCK_H)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        expert, row, end, column_tile = tile_at(tile, tiles, num_row_tiles, num_column_tiles, GROUP_M)
        matrix = expert - first_expert
        rows = row + tl.arange(0, BLOCK_M)
        sources = tl.minimum(rows, end - 1)  # past the end is a copy of the last row, which is not stored
        slots = tl.load(order + sources)
        x_rows = offset(slots // TOP_K, x_strides[0])[:, None]
        first = column_tile * BLOCK_W
        columns = first + tl.arange(0, BLOCK_W)
        start, others = first + width, columns + width  # of ups, where columns are gates
        limit = width if LAYOUT == "concatenated" else N
        bound = limit if FORMAT is None else N  # codes past the gates are ups, and not stored
        total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
        up = total  # the second half, of a concatenated layout only
        matrices = (w, scales, w_strides)
        pointers = pointers_to(matrices, matrix, columns, AHEAD, BLOCK_K)
        of_others = pointers_to(matrices, matrix, others, AHEAD, BLOCK_K)
        held = no_scales(FORMAT, BLOCK_W)
        held_others = held
        for k in tl.range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            offsets = x_rows + offset(ks, x_strides[1])[None, :]
            a = tl.load(x + offsets) if EVEN_K else tl.load(x + offsets, mask=(ks < K)[None, :], other=0.0)
            a = rounded(a, PRECISION)
            at = (matrix, columns, first, k)
            if held is not None:
                held = next_scales(held, matrices, at, (bound, K), FORMAT)
            b = load_matrix(matrices, pointers, held, at, (bound, K), FORMAT, TMA, EVEN_K, BLOCK_W, BLOCK_K)
            total = tl.dot(a, rounded(b.to(a.dtype), PRECISION), total, input_precision=PRECISION)
            if LAYOUT == "concatenated":
                at = (matrix, others, start, k)
                if held is not None:
                    held_others = next_scales(held_others, matrices, at, (N, K), FORMAT)
                c = load_matrix(matrices, of_others, held_others, at, (N, K), FORMAT, TMA, EVEN_K, BLOCK_W, BLOCK_K)
                up = tl.dot(a, rounded(c.to(a.dtype), PRECISION), up, input_precision=PRECISION)
        if BLOCK_R:
            adapter = (inner, inner_powers, factor, factor_strides)
            total = add_adapter(total, adapter, expert, sources, columns, limit, R, PRECISION, BLOCK_R)
            if LAYOUT == "concatenated":
                up = add_adapter(up, adapter, expert, sources, others, N, R, PRECISION, BLOCK_R)
        if SCALE_INPUT:
            scale = tl.load(topk_weights + slots).to(tl.float32)[:, None]
            total *= scale
            up *= scale
        if HAS_BIAS:
            total += load_bias(bias, bias_strides, expert, columns, limit)
            if LAYOUT == "concatenated":
                up += load_bias(bias, bias_strides, expert, others, N)
        mask = (rows < end)[:, None]
        if STORE_Z:
            z_rows = z + offset(row, N) + (tl.arange(0, BLOCK_M) * N)[:, None]
            tl.store(z_rows + columns[None, :], total.to(z.dtype.element_ty), mask=mask & (columns < limit)[None, :])
            if LAYOUT == "concatenated":
                tl.store(z_rows + others[None, :], up.to(z.dtype.element_ty), mask=mask & (others < N)[None, :])
        if LAYOUT == "":
            value = act(total, ACTIVATION, ALPHA)
        elif LAYOUT == "concatenated":
            value = gated(total, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET, LATE, GATE_SOFTCAP, UP_SOFTCAP)
        else:
            even, odd = tl.split(total.reshape(BLOCK_M, BLOCK_H, 2))
            value = gated(even, odd, ACTIVATION, ALPHA, LIMIT, UP_OFFSET, LATE, GATE_SOFTCAP, UP_SOFTCAP)
        out = column_tile * BLOCK_H + tl.arange(0, BLOCK_H)
        offsets = offset(rows, width)[:, None] + out[None, :]
        tl.store(h + offsets, value.to(h.dtype.element_ty), mask=mask & (out < width)[None, :])


@triton.jit(do_not_specialize=["first_expert", "last_expert"])
def down_kernel(
    h,  # [S, K] rows sorted by expert, or a descriptor of it
    h_powers,  # [S] by which rows of h were divided, or None
    w,  # [E, N, K], or a descriptor of it, or codes of it in 4 bits
    scales,  # of codes, else empty
    bias,  # [E, N], or anything where HAS_BIAS is False
    topk_weights,  # [S], read where WEIGHTED
    inner,  # [S, R] rows times the adapter's first factor, read where BLOCK_R
    inner_powers,  # [S] by which rows of inner were divided, or None
    factor,  # [E, N, R] the adapter's second factor, read where BLOCK_R
    order,  # [S] the slot of each row
    tiles,  # [1 + tiles, 3] from kernels.grouping
    bounds,  # [E + 1] where each expert's row tiles begin, read where PART
    first_expert,  # the first one in w: 0, or where PART any
    last_expert,  # the first one after those in w, read where PART
    out,  # [S, N] out, each row at its slot
    N,
    K,
    R,
    w_strides,  # of codes, bytes
    bias_strides,
    factor_strides,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PART: tl.constexpr,
    FORMAT: tl.constexpr,  # of codes, or None
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,  # whether pointers to w are computed before the loop over k
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of the adapter's rank, or 0 without one
    GROUP_M: tl.constexpr,
):
    """The slots' h W^T + b, plus an adapter's part, times the weight where WEIGHTED. Empty slots are not written."""
    tiles, num_row_tiles = part_of(tiles, bounds, first_expert, last_expert, PART)
    num_column_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        expert, row, end, column_tile = tile_at(tile, tiles, num_row_tiles, num_column_tiles, GROUP_M)
        matrix = expert - first_expert
        rows = row + tl.arange(0, BLOCK_M)
        first = column_tile * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        sources = tl.minimum(rows, end - 1)
        h_rows = offset(sources, K)[:, None]
        o = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        matrices = (w, scales, w_strides)
        pointers = pointers_to(matrices, matrix, columns, AHEAD, BLOCK_K)
        held = no_scales(FORMAT, BLOCK_N)
        for k in tl.range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            if TMA != "":
                a = h.load(
                    [row, k]
                )  # rows past the end are of other experts or unwritten, and their results are not stored
            elif EVEN_K:
                a = tl.load(h + h_rows + ks[None, :])
            else:
                a = tl.load(h + h_rows + ks[None, :], mask=(ks < K)[None, :], other=0.0)
            at = (matrix, columns, first, k)
            if held is not None:
                held = next_scales(held, matrices, at, (N, K), FORMAT)
            b = load_matrix(matrices, pointers, held, at, (N, K), FORMAT, TMA, EVEN_K, BLOCK_N, BLOCK_K)
            o = tl.dot(rounded(a, PRECISION), rounded(b.to(a.dtype), PRECISION), o, input_precision=PRECISION)
        if h_powers is not None:
            o *= tl.load(h_powers + sources)[:, None]
        if BLOCK_R:
            adapter = (inner, inner_powers, factor, factor_strides)
            o = add_adapter(o, adapter, expert, sources, columns, N, R, PRECISION, BLOCK_R)
        slots = tl.load(order + sources)
        if HAS_BIAS:
            o += load_bias(bias, bias_strides, expert, columns, N)
        if WEIGHTED:
            o *= tl.load(topk_weights + slots).to(tl.float32)[:, None]
        offsets = offset(slots, N)[:, None] + columns[None, :]
        tl.store(out + offsets, o.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (columns < N)[None, :])
