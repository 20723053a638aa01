"""MXFP4, the format of gpt-oss' checkpoints, bit for bit: decoding and quantising (clause M1).

A number is an e2m1 code (sign, two bits of exponent, one of mantissa) times a power of two that 32 codes share.
Source: OCP Microscaling Formats (MX) 1.0, sections 5 and 6.3.
"""

from __future__ import annotations

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Float, UInt8
from moe_ref.numerics import round_to_nearest
from moe_ref.types import MXFP4Tensor
from moe_ref.validation import check_mxfp4, check_quantize_mxfp4

POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_CODE = (*POSITIVE, *(-number for number in POSITIVE))  # with -0
BLOCKSIZE = 32
BIAS = 127  # of exponents
NAN = 255  # the exponent of NaN
LARGEST_EXPONENT = 2  # of a code: 6 is 1.5 * 2**2


def unpack(blocks: UInt8[Array, "*rows bytes"]) -> UInt8[Array, "*rows 2*bytes"]:
    """Unpacks bytes into codes, the low nibble first."""
    xp = array_namespace(blocks)
    pairs = xp.stack([blocks & 15, blocks >> 4], axis=-1)
    return xp.reshape(pairs, (*blocks.shape[:-1], 2 * blocks.shape[-1]))


def pack(codes: UInt8[Array, "*rows 2*bytes"]) -> UInt8[Array, "*rows bytes"]:
    """Packs codes into bytes, the low nibble first."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def scale_of(scales: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2 ** (scales - 127) in float64, and NaN for 255."""
    xp = array_namespace(scales)
    one = xp.ones(scales.shape, dtype=xp.float64, device=device(scales))
    powers = xp.ldexp(one, xp.astype(scales, xp.int32) - BIAS)
    return xp.where(scales == NAN, one * xp.nan, powers)


def decode(tensor: MXFP4Tensor) -> Array:
    """Decodes all numbers: ``tensor.shape``, in fp32, each representable in ``tensor.dtype``.

    A number is a code times its scale, rounded once, to nearest. In bf16 and fp32 it is exact, or infinite past the
    format's range.

    Args:
        tensor: of any shape.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_mxfp4("tensor", tensor)
    return _decode(tensor.blocks, tensor.scales, tensor)


def decode_expert(tensor: MXFP4Tensor, index: int) -> Float[Array, "m k"]:
    """Decodes one expert of a projection (E, m, k), as `decode` does, and none of the others."""
    return _decode(tensor.blocks[index, ...], tensor.scales[index, ...], tensor)


def _decode(blocks: UInt8[Array, "*rows g 16"], scales: UInt8[Array, "*rows g"], tensor: MXFP4Tensor) -> Array:
    xp = array_namespace(blocks)
    table = xp.asarray(E2M1_CODE, dtype=xp.float64, device=device(blocks))
    codes = xp.astype(unpack(blocks), xp.int64)
    numbers = xp.reshape(xp.take(table, xp.reshape(codes, (-1,)), axis=0), codes.shape)
    rounded = xp.astype(round_to_nearest(numbers * scale_of(scales)[..., None], tensor.dtype), xp.float32)
    *rows, groups, size = codes.shape
    stored = xp.reshape(rounded, (*rows, groups * size))
    return xp.matrix_transpose(stored) if tensor.transposed else stored


def quantize(values: Float[Array, "*rows k"], *, dtype: str = "bfloat16") -> MXFP4Tensor:
    """Quantises numbers along their last dimension.

    The scale of a block is the power of two that brings its largest magnitude to between 4 and 8. Each number then gets
    the nearest code; of two equally near codes, the one with an even mantissa; beyond 6, the code of 6. A block of
    zeros gets the smallest scale. Source: OCP Microscaling Formats 1.0, section 6.3.

    Args:
        values: finite, fp32 or narrower; the last dimension a multiple of 32.
        dtype: the dtype to decode to: "float32", "bfloat16" or "float16".

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_quantize_mxfp4(values, dtype)
    xp = array_namespace(values)
    *rows, width = values.shape
    groups = xp.reshape(xp.astype(values, xp.float64), (*rows, width // BLOCKSIZE, BLOCKSIZE))
    largest = xp.max(xp.abs(groups), axis=-1)
    _, exponent = xp.frexp(largest)  # largest = m * 2**exponent with 0.5 <= m < 1
    scales = xp.clip(xp.astype(exponent, xp.int32) - 1 - LARGEST_EXPONENT + BIAS, min=0, max=NAN - 1)
    scales = xp.astype(xp.where(largest == 0, xp.zeros_like(scales), scales), xp.uint8)
    scaled = groups / scale_of(scales)[..., None]
    codes = xp.astype(_nearest(xp.abs(scaled)), xp.uint8)
    codes = codes | xp.astype(xp.where(scaled < 0, 8, 0), xp.uint8)
    return MXFP4Tensor(pack(codes), scales, dtype=dtype)


def _nearest(magnitudes: Float[Array, "*shape"]) -> Array:
    """The code nearest to each non-negative number; of two equally near codes, the even one."""
    xp = array_namespace(magnitudes)
    found = xp.zeros(magnitudes.shape, dtype=xp.int32, device=device(magnitudes))
    for code in range(1, len(POSITIVE)):
        midpoint = (POSITIVE[code - 1] + POSITIVE[code]) / 2
        beyond = magnitudes >= midpoint if code % 2 == 0 else magnitudes > midpoint
        found = xp.where(beyond, xp.full_like(found, code), found)
    return found
