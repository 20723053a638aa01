"""Decodes matrices in 4 bits on their way into a product: NF4, FP4 and MXFP4, bit for bit (clauses Q1 to Q3, M1).

A number is one product in fp32: its code's entry in a table of sixteen, times the scale of its block. The product
kernels round it once to the dtype of the rows. Codes and blocks run along the last stored dimension, "inner", and on
from one row to the next; "outer" is the other dimension.
"""

import triton
import triton.language as tl

from executors._triton.kernels.addresses import offset


@triton.jit
def load_packed(packed, at, sizes, FORMAT, BLOCK_N, BLOCK_K):
    """[BLOCK_K, BLOCK_N] in fp32 of an expert's matrix [N, K], transposed; any numbers outside.

    Args as of `load_matrix`. The strides are bytes from one expert, and from one outer row, to the next.
    """
    expert, columns, first, k = at
    N, K = sizes
    ks = k + tl.arange(0, BLOCK_K)
    if FORMAT.by_rows:  # the matrix is stored as it is read: k is its inner dimension
        values = _load_stored(packed, (expert, columns, k), (N, K), FORMAT, BLOCK_N, BLOCK_K).T
    else:
        values = _load_stored(packed, (expert, ks, first), (K, N), FORMAT, BLOCK_K, BLOCK_N)
    return values


@triton.jit
def _load_stored(packed, at, sizes, FORMAT, BLOCK_O, BLOCK_I):
    """[BLOCK_O, BLOCK_I] in fp32, in the order in which it is stored; ``at`` is (expert, outer, first of inner)."""
    codes, scales, strides = packed
    expert, outer, start = at
    OUTER, INNER = sizes
    mask = (outer < OUTER)[:, None]
    if FORMAT.grain == 1:  # rows of an odd length: they begin within bytes
        inner = start + tl.arange(0, BLOCK_I)
        mask = mask & (inner < INNER)[None, :]
        offsets = offset(offset(expert, OUTER) + outer, INNER)[:, None] + inner[None, :]
        pairs = tl.load(codes + offsets // 2, mask=mask, other=0).to(tl.int32)
        index = tl.where(offsets % 2 == 0, pairs >> 4, pairs & 15)
        scale = load_scale(scales, expert, offsets >> FORMAT.block_bits, mask, FORMAT)
        values = _of_codes(index, FORMAT, BLOCK_O, BLOCK_I) * scale
    else:
        pairs = start // FORMAT.grain * (FORMAT.grain // 2) + tl.arange(0, BLOCK_I // 2)
        offsets = offset(expert, strides[0]) + offset(outer, strides[1])[:, None] + pairs[None, :]
        pair = tl.load(codes + offsets, mask=mask & (pairs < strides[1])[None, :], other=0).to(tl.int32)
        index = tl.join(pair & 15, pair >> 4) if FORMAT.low_first else tl.join(pair >> 4, pair & 15)
        values = _of_codes(index, FORMAT, BLOCK_O, BLOCK_I)
        # A grain is a run of neighbours that share a block, wherever the row and the tile begin.
        GRAINS: tl.constexpr = BLOCK_I // FORMAT.grain
        grains = start // FORMAT.grain + tl.arange(0, GRAINS)
        mask = mask & (grains * FORMAT.grain < INNER)[None, :]
        offsets = offset(offset(expert, OUTER) + outer, INNER // FORMAT.grain)[:, None] + grains[None, :]
        scale = load_scale(scales, expert, offsets >> (FORMAT.block_bits - FORMAT.grain_bits), mask, FORMAT)
        if GRAINS == 1:
            values = values * scale
        else:
            values = tl.reshape(values, (BLOCK_O, GRAINS, FORMAT.grain)) * scale[:, :, None]
            values = tl.reshape(values, (BLOCK_O, BLOCK_I))
    return values


@triton.jit
def _of_codes(index, FORMAT, BLOCK_O, BLOCK_I):
    """[BLOCK_O, BLOCK_I] The table's entries for codes, in fp32."""
    entries = tl.arange(0, 16)
    bits = tl.zeros((16,), tl.int32)
    for code in tl.static_range(16):
        bits = tl.where(entries == code, FORMAT.table[code], bits)
    table = bits.to(tl.float32, bitcast=True)
    return tl.reshape(tl.gather(table, tl.reshape(index, (BLOCK_O * BLOCK_I,)), 0), (BLOCK_O, BLOCK_I))


@triton.jit
def load_scale(scales, expert, blocks, mask, FORMAT):
    """The scales of blocks, in fp32; outside the mask, the scale of code 0."""
    values = tl.load(scales[0] + blocks, mask=mask, other=0)
    if FORMAT.powers:  # exponents with a bias of 127, as in fp32, except 2**-127 and NaN (M1)
        bits = values.to(tl.int32)
        bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
        scale = bits.to(tl.float32, bitcast=True)
    elif FORMAT.nested:  # a product, then a sum, each rounded to fp32 (Q3): launched without fusion
        if FORMAT.segmented:
            nested = offset(expert, scales[4]) + (blocks - offset(expert, scales[5])) // FORMAT.nested_blocksize
            shift = tl.load(scales[3] + expert)
        else:
            nested = blocks // FORMAT.nested_blocksize
            shift = tl.load(scales[3])
        coarse = tl.load(scales[1] + nested, mask=mask, other=0.0)
        fine = tl.load(scales[2] + values.to(tl.int32), mask=mask, other=0.0)
        scale = tl.where(mask, fine * coarse + shift, 0.0)  # an offset alone may be infinite in 16 bits
    else:
        scale = values
    return scale


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
        values = _load_stored(packed, (expert, outer, start), (OUTER, INNER), FORMAT, BLOCK_O, BLOCK_I)
        offsets = offset(offset(place, OUTER) + outer, INNER)[:, None] + inner[None, :]
        mask = (outer < OUTER)[:, None] & (inner < INNER)[None, :]
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)
