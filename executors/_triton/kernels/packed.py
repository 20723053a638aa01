"""Decodes matrices in 4 bits on their way into a product: NF4, FP4 and MXFP4, bit for bit (clauses Q1 to Q3, M1).

A number is one product in fp32: its code's entry in a table of sixteen, times the scale of its block. The product
kernels round it once to the dtype of the rows. Codes and blocks run along the last stored dimension, "inner", and on
from one row to the next; "outer" is the other dimension.
"""

import triton
import triton.language as tl

from executors._triton.kernels.addresses import offset
from executors._triton.kernels.scales import held_scale, load_scale


@triton.jit
def load_packed(packed, held, at, sizes, FORMAT, EVEN_K, BLOCK_N, BLOCK_K):
    """[BLOCK_K, BLOCK_N] in fp32 of an expert's matrix [N, K], transposed; any numbers outside.

    Args as of `load_matrix`. The strides are bytes from one expert, and from one outer row, to the next. ``held`` are
    scales from `next_scales`, or None.
    """
    expert, columns, first, k = at
    N, K = sizes
    ks = k + tl.arange(0, BLOCK_K)
    if FORMAT.by_rows:  # the matrix is stored as it is read: k is its inner dimension
        at = (expert, columns, k)
        values = _load_stored(packed, held, at, (N, K), FORMAT, False, EVEN_K, BLOCK_N, BLOCK_K).T
    else:
        at = (expert, ks, first)
        values = _load_stored(packed, None, at, (K, N), FORMAT, EVEN_K, False, BLOCK_K, BLOCK_N)
    return values


@triton.jit
def _load_stored(packed, held, at, sizes, FORMAT, EVEN_OUTER, EVEN_INNER, BLOCK_O, BLOCK_I):
    """[BLOCK_O, BLOCK_I] in fp32, in the order in which it is stored; ``at`` is (expert, outer, first of inner).

    In a dimension that is even, none is outside.
    """
    codes, scales, strides = packed
    expert, outer, start = at
    OUTER, INNER = sizes
    if FORMAT.grain == 1:  # rows begin within words, or within bytes
        inner = start + tl.arange(0, BLOCK_I)
        mask = _inside(outer, inner, sizes, EVEN_OUTER, EVEN_INNER)
        offsets = offset(offset(expert, OUTER) + outer, INNER)[:, None] + inner[None, :]
        pairs = tl.load(codes + offsets // 2, mask=mask, other=0).to(tl.int32)
        index = tl.where(offsets % 2 == FORMAT.low_first, pairs >> 4, pairs & 15)
        scale = load_scale(scales, expert, offsets >> FORMAT.block_bits, mask, FORMAT)
        values = _of_codes(index, FORMAT, BLOCK_O, BLOCK_I) * scale
    else:
        width = strides[1] // 4
        places = start // FORMAT.grain * (FORMAT.grain // 8) + tl.arange(0, BLOCK_I // 8)
        offsets = offset(expert, strides[0] // 4) + offset(outer, width)[:, None] + places[None, :]
        mask = _inside(outer, places, (OUTER, width), EVEN_OUTER, EVEN_INNER)
        words = tl.load(codes.to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0)
        values = _of_codes(_codes_of(words, FORMAT), FORMAT, BLOCK_O, BLOCK_I)
        # A grain is a run of neighbours that share a block, wherever the row and the tile begin.
        GRAINS: tl.constexpr = BLOCK_I // FORMAT.grain
        if held is None:
            grains = start // FORMAT.grain + tl.arange(0, GRAINS)
            mask = _inside(outer, grains, (OUTER, INNER // FORMAT.grain), EVEN_OUTER, EVEN_INNER)
            offsets = offset(offset(expert, OUTER) + outer, INNER // FORMAT.grain)[:, None] + grains[None, :]
            scale = load_scale(scales, expert, offsets >> (FORMAT.block_bits - FORMAT.grain_bits), mask, FORMAT)
        else:
            scale = held_scale(held, packed, (expert, outer, 0, start), sizes, FORMAT, GRAINS)
        if GRAINS == 1:
            values = values * scale
        else:
            values = tl.reshape(values, (BLOCK_O, GRAINS, FORMAT.grain)) * scale[:, :, None]
            values = tl.reshape(values, (BLOCK_O, BLOCK_I))
    return values


@triton.jit
def _inside(outer, inner, sizes, EVEN_OUTER, EVEN_INNER):
    """[outer, inner] Whether they lie in a matrix [OUTER, INNER]; 1 instead of the other number for an even one."""
    OUTER, INNER = sizes
    if EVEN_OUTER:
        mask = (inner < INNER)[None, :]
    elif EVEN_INNER:
        mask = (outer < OUTER)[:, None]
    else:
        mask = (outer < OUTER)[:, None] & (inner < INNER)[None, :]
    return mask


@triton.jit
def _codes_of(words, FORMAT):
    """[O, W, 2, 2, 2] The eight codes of each word [O, W], in order: halves of it, bytes of those, codes of those."""
    low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    pairs = tl.join(low, high) if FORMAT.low_first else tl.join(high, low)
    of_halves = tl.join(pairs, pairs >> 16)
    of_bytes = tl.join(of_halves, of_halves >> 8) & 255
    return tl.permute(of_bytes, (0, 1, 3, 4, 2))


@triton.jit
def _of_codes(index, FORMAT, BLOCK_O, BLOCK_I):
    """[BLOCK_O, BLOCK_I] The table's entries for codes, in fp32."""
    entries = tl.arange(0, 16)
    bits = tl.zeros((16,), tl.int32)
    for code in tl.static_range(16):
        bits = tl.where(entries == code, FORMAT.table[code], bits)
    table = bits.to(tl.float32, bitcast=True)
    return tl.reshape(tl.gather(table, tl.reshape(index, (BLOCK_O * BLOCK_I,)), 0), (BLOCK_O, BLOCK_I))


@triton.jit(do_not_specialize=["first"])
def decode_kernel(
    codes,
    scales,
    group_offsets,  # [E + 1]
    out,  # [last - first, OUTER, INNER] out, of any float dtype
    first,
    OUTER,
    INNER,
    strides,  # bytes from one expert, and from one outer row, to the next
    FORMAT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Decodes experts from ``first`` on in the order in which they are stored, but not those without rows."""
    place = tl.program_id(2)
    expert = first + place
    if tl.load(group_offsets + expert) < tl.load(group_offsets + expert + 1):
        start = tl.program_id(0) * BLOCK_I
        outer = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        inner = start + tl.arange(0, BLOCK_I)
        packed = (codes, scales, strides)
        at = (expert, outer, start)
        values = _load_stored(packed, None, at, (OUTER, INNER), FORMAT, False, False, BLOCK_O, BLOCK_I)
        offsets = offset(offset(place, OUTER) + outer, INNER)[:, None] + inner[None, :]
        mask = (outer < OUTER)[:, None] & (inner < INNER)[None, :]
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)
