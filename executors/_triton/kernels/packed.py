"""Matrices in 4 bits, decoded on their way into a product: NF4, FP4 and MXFP4, bit for bit (clauses Q1 to Q3, M1).

A number is its code's entry in a table of sixteen, times the scale of its block, one product in fp32; the product
kernels then round it once to the dtype of the rows. Codes and blocks run along the last stored dimension, "inner",
and on from one row to the next; "outer" is the other one.
"""

import triton
import triton.language as tl

from executors._triton.kernels.addresses import offset


@triton.jit
def load_packed(codes, scales, expert, columns, first, k, N, K, strides, FORM, BLOCK_N, BLOCK_K):
    """[BLOCK_K, BLOCK_N] in fp32 of an expert's matrix [N, K], transposed; any numbers outside.

    Args: as of ``load_matrix``; strides are bytes of an expert and of an outer row.
    """
    ks = k + tl.arange(0, BLOCK_K)
    if FORM.by_rows:  # the matrix is stored as it is read: k is its inner dimension
        values = _load_stored(codes, scales, expert, columns, k, N, K, strides, FORM, BLOCK_N, BLOCK_K).T
    else:
        values = _load_stored(codes, scales, expert, ks, first, K, N, strides, FORM, BLOCK_K, BLOCK_N)
    return values


@triton.jit
def _load_stored(codes, scales, expert, outer, start, OUTER, INNER, strides, FORM, BLOCK_O, BLOCK_I):
    """[BLOCK_O, BLOCK_I] in fp32, in the order in which it is stored, inner from ``start`` on."""
    there = (outer < OUTER)[:, None]
    if FORM.grain == 1:  # rows of an odd length: they begin within bytes
        inner = start + tl.arange(0, BLOCK_I)
        there = there & (inner < INNER)[None, :]
        places = offset(offset(expert, OUTER) + outer, INNER)[:, None] + inner[None, :]
        pairs = tl.load(codes + places // 2, mask=there, other=0).to(tl.int32)
        index = tl.where(places % 2 == 0, pairs >> 4, pairs & 15)
        scale = load_scale(scales, expert, places >> FORM.block_bits, there, FORM)
        values = _of_codes(index, FORM, BLOCK_O, BLOCK_I) * scale
    else:
        pairs = start // FORM.grain * (FORM.grain // 2) + tl.arange(0, BLOCK_I // 2)
        places = offset(expert, strides[0]) + offset(outer, strides[1])[:, None] + pairs[None, :]
        pair = tl.load(codes + places, mask=there & (pairs < strides[1])[None, :], other=0).to(tl.int32)
        index = tl.join(pair & 15, pair >> 4) if FORM.low_first else tl.join(pair >> 4, pair & 15)
        values = _of_codes(index, FORM, BLOCK_O, BLOCK_I)
        # a grain is as many neighbours as surely share a block, whatever row and column they begin at
        GRAINS: tl.constexpr = BLOCK_I // FORM.grain
        grains = start // FORM.grain + tl.arange(0, GRAINS)
        there = there & (grains * FORM.grain < INNER)[None, :]
        places = offset(offset(expert, OUTER) + outer, INNER // FORM.grain)[:, None] + grains[None, :]
        scale = load_scale(scales, expert, places >> (FORM.block_bits - FORM.grain_bits), there, FORM)
        if GRAINS == 1:
            values = values * scale
        else:
            values = tl.reshape(values, (BLOCK_O, GRAINS, FORM.grain)) * scale[:, :, None]
            values = tl.reshape(values, (BLOCK_O, BLOCK_I))
    return values


@triton.jit
def _of_codes(index, FORM, BLOCK_O, BLOCK_I):
    """[BLOCK_O, BLOCK_I] What codes stand for, in fp32."""
    places = tl.arange(0, 16)
    bits = tl.zeros((16,), tl.int32)
    for code in tl.static_range(16):
        bits = tl.where(places == code, FORM.table[code], bits)
    table = bits.to(tl.float32, bitcast=True)
    return tl.reshape(tl.gather(table, tl.reshape(index, (BLOCK_O * BLOCK_I,)), 0), (BLOCK_O, BLOCK_I))


@triton.jit
def load_scale(scales, expert, blocks, there, FORM):
    """The scales of blocks, in fp32; where there are none, what 0 stands for."""
    own = tl.load(scales[0] + blocks, mask=there, other=0)
    if FORM.powers:  # exponents with a bias of 127: as fp32 has them, but for 2**-127 and NaN (M1)
        bits = own.to(tl.int32)
        bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
        scale = bits.to(tl.float32, bitcast=True)
    elif FORM.nested:  # a product, then a sum, each rounded to fp32 (Q3): launched without contraction into one
        if FORM.segmented:
            nested = offset(expert, scales[4]) + (blocks - offset(expert, scales[5])) // FORM.nested_blocksize
            shift = tl.load(scales[3] + expert)
        else:
            nested = blocks // FORM.nested_blocksize
            shift = tl.load(scales[3])
        coarse = tl.load(scales[1] + nested, mask=there, other=0.0)
        fine = tl.load(scales[2] + own.to(tl.int32), mask=there, other=0.0)
        scale = tl.where(there, fine * coarse + shift, 0.0)  # an offset alone may be infinite in 16 bits
    else:
        scale = own
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
    stride_ce,
    stride_co,
    FORM: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The numbers of experts from ``first`` on, in the order in which they are stored; none of those without rows."""
    place = tl.program_id(2)
    expert = first + place
    if tl.load(group_offsets + expert) < tl.load(group_offsets + expert + 1):
        start = tl.program_id(0) * BLOCK_I
        outer = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        inner = start + tl.arange(0, BLOCK_I)
        strides = (stride_ce, stride_co)
        values = _load_stored(codes, scales, expert, outer, start, OUTER, INNER, strides, FORM, BLOCK_O, BLOCK_I)
        places = offset(offset(place, OUTER) + outer, INNER)[:, None] + inner[None, :]
        there = (outer < OUTER)[:, None] & (inner < INNER)[None, :]
        tl.store(out + places, values.to(out.dtype.element_ty), mask=there)
