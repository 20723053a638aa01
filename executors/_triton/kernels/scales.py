"""Scales of codes in 4 bits, in fp32: powers of two, 8-bit codes themselves, or numbers (clauses Q2, Q3, M1)."""

import triton
import triton.language as tl

from executors._triton.kernels.addresses import offset


@triton.jit
def load_scale(scales, expert, blocks, mask, FORMAT):
    """The scales of blocks; outside the mask, the scale of code 0."""
    values = tl.load(scales[0] + blocks, mask=mask, other=0)
    if FORMAT.powers or FORMAT.nested:
        # Triton arranges an operand's registers after the narrowest load behind it, as far as it sees one through
        # operations on elements. Bytes would make shared memory slow, so a maximum of one number hides them.
        values = tl.max(values.to(tl.int32)[:, :, None], axis=2)
    if FORMAT.powers:
        scale = _power(values)
    elif FORMAT.nested:
        coarse = tl.load(scales[1] + _nested(scales, expert, blocks, FORMAT), mask=mask, other=0.0)
        scale = tl.where(mask, _of_nested(scales, expert, values, coarse, mask, FORMAT), 0.0)  # an offset may be inf
    else:
        scale = values
    return scale


@triton.jit
def no_scales(FORMAT, BLOCK_N):
    """What `next_scales` begins with, where FORMAT holds scales; else None."""
    held = None
    if FORMAT is not None:
        if FORMAT.span:
            WORD: tl.constexpr = tl.int64 if FORMAT.span == 8 else tl.int32 if FORMAT.span == 4 else tl.int16
            held = (tl.zeros((BLOCK_N,), WORD), tl.zeros((BLOCK_N,), tl.float32))
    return held


@triton.jit
def next_scales(held, packed, at, sizes, FORMAT):
    """The scales of a run of ``FORMAT.span`` blocks of each row [columns] of an expert's matrix [N, K].

    They are loaded once, where k begins a run. Returns (bytes of scales, what multiplies them where they are nested).
    """
    _, scales, _ = packed
    expert, columns, _, k = at
    N, K = sizes
    words, coarse = held
    RUN: tl.constexpr = FORMAT.span << FORMAT.block_bits
    if k % RUN == 0:
        runs = (offset(expert, N) + columns) * (K // RUN) + k // RUN
        mask = columns < N
        words = tl.load(scales[0].to(tl.pointer_type(words.dtype)) + runs, mask=mask, other=0)
        if FORMAT.nested:
            coarse = tl.load(scales[1] + _nested(scales, expert, runs * FORMAT.span, FORMAT), mask=mask, other=0.0)
    return words, coarse


@triton.jit
def held_scale(held, packed, at, sizes, FORMAT, GRAINS):
    """[columns, GRAINS] Those of the blocks from k on; any numbers in columns outside."""
    _, scales, _ = packed
    expert, columns, _, k = at
    words, coarse = held
    blocks = (k >> FORMAT.block_bits & (FORMAT.span - 1)) + tl.arange(0, GRAINS)
    values = (words[:, None] >> (8 * blocks)[None, :].to(words.dtype)).to(tl.int32) & 255
    if FORMAT.powers:
        scale = _power(values)
    else:
        scale = _of_nested(scales, expert, values, coarse[:, None], (columns < sizes[0])[:, None], FORMAT)
    return scale


@triton.jit
def _power(values):
    """Exponents with a bias of 127, as in fp32, except 2**-127 and NaN (M1)."""
    bits = values.to(tl.int32)
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nested(scales, expert, blocks, FORMAT):
    """The nested scales of blocks."""
    if FORMAT.segmented:
        nested = offset(expert, scales[4]) + (blocks - offset(expert, scales[5])) // FORMAT.nested_blocksize
    else:
        nested = blocks // FORMAT.nested_blocksize
    return nested


@triton.jit
def _of_nested(scales, expert, values, coarse, mask, FORMAT):
    """A product, then a sum, each rounded to fp32 (Q3): launched without fusion."""
    shift = tl.load(scales[3] + expert) if FORMAT.segmented else tl.load(scales[3])
    fine = tl.load(scales[2] + values, mask=mask, other=0.0)
    return fine * coarse + shift
