"""bitsandbytes' NF4 and FP4, bit for bit: decoding and quantising (clauses Q1 to Q5).

Decoding has one right answer, to the last bit, and this module gives it. Sources: Dettmers et al. 2023
(arXiv:2305.14314) for NF4 and nested statistics; Dettmers et al. 2022 (arXiv:2110.02861) for their 8-bit code.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Float, UInt8
from moe_ref.numerics import round_to_nearest
from moe_ref.types import NF4Tensor, QuantType
from moe_ref.validation import check_nf4, check_quantize

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A sign, then a magnitude in twelfths: 0, a subnormal number, and six more. Code 8 is 0 too, not -0.
FP4_CODE = tuple(n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
CODES: dict[QuantType, tuple[float, ...]] = {"nf4": NF4_CODE, "fp4": FP4_CODE}
NESTED_BLOCKSIZE = 256
SMALLEST_ABSMAX = 1e-38  # no block is divided by less (Q4)


def unpack(packed: UInt8[Array, " bytes"], count: int) -> UInt8[Array, " count"]:
    """Unpacks bytes into codes, the high nibble first (Q1).

    Args:
        packed: two codes to a byte.
        count: number of codes: twice the number of bytes, or one less.
    """
    xp = array_namespace(packed)
    return xp.reshape(xp.stack([packed >> 4, packed & 15], axis=-1), (-1,))[:count]


def pack(codes: UInt8[Array, " count"], last: int) -> UInt8[Array, " bytes"]:
    """Packs codes into bytes, the high nibble first (Q1); ``last`` fills an odd last byte."""
    xp = array_namespace(codes)
    if codes.shape[0] % 2:
        codes = xp.concat([codes, xp.asarray([last], dtype=xp.uint8, device=device(codes))])
    return (codes[0::2] << 4) | codes[1::2]


def absmax_of(tensor: NF4Tensor) -> Float[Array, " blocks"]:
    """The scale of each block, in fp32 (Q3)."""
    check_nf4("tensor", tensor)
    return _absmax(tensor, 0, tensor.absmax.shape[0])


def decode(tensor: NF4Tensor) -> Array:
    """Decodes all numbers: ``tensor.shape``, in fp32, each representable in ``tensor.dtype`` (Q2).

    Args:
        tensor: of any shape.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_nf4("tensor", tensor)
    return _laid_out(_decode(tensor, 0, tensor.size), tensor, tensor.stored_shape)


def decode_expert(tensor: NF4Tensor, index: int) -> Float[Array, "m k"]:
    """Decodes one expert of a projection (E, m, k), as `decode` does, and none of the others."""
    size = tensor.size // tensor.shape[0]
    return _laid_out(_decode(tensor, index * size, (index + 1) * size), tensor, tensor.stored_shape[1:])


def _laid_out(values: Float[Array, " count"], tensor: NF4Tensor, stored_shape: tuple[int, ...]) -> Array:
    xp = array_namespace(values)
    stored = xp.reshape(values, stored_shape)
    return xp.matrix_transpose(stored) if tensor.transposed else stored


def _decode(tensor: NF4Tensor, start: int, stop: int) -> Float[Array, " count"]:
    """Decodes the numbers from ``start`` to ``stop``, in storage order.

    Each is one product in fp32, then rounded once to the tensor's dtype (Q2).
    """
    xp = array_namespace(tensor.packed)
    where = device(tensor.packed)
    before = start // 2 * 2
    codes = unpack(tensor.packed[start // 2 : ceil(stop / 2)], stop - before)[start - before :]
    table = xp.asarray(CODES[tensor.quant_type], dtype=xp.float32, device=where)
    first, last = start // tensor.blocksize, ceil(stop / tensor.blocksize)
    blocks = xp.arange(start, stop, device=where) // tensor.blocksize - first
    scale = xp.take(_absmax(tensor, first, last), blocks, axis=0)
    products = xp.take(table, xp.astype(codes, xp.int64), axis=0) * scale
    return xp.astype(round_to_nearest(xp.astype(products, xp.float64), tensor.dtype), xp.float32)


def _absmax(tensor: NF4Tensor, first: int, stop: int) -> Float[Array, " blocks"]:
    """The scales of the blocks from ``first`` to ``stop``: a product and then a sum, each rounded to fp32 (Q3)."""
    absmax = tensor.absmax[first:stop]
    if tensor.nested_absmax is None:
        return absmax
    xp = array_namespace(absmax)
    blocks = tensor.absmax.shape[0] // tensor.segments
    places = xp.arange(first, stop, device=device(absmax))
    segments = places // blocks
    nested = segments * ceil(blocks / tensor.nested_blocksize) + places % blocks // tensor.nested_blocksize
    codes = xp.take(tensor.nested_code, xp.astype(absmax, xp.int64), axis=0)
    products = codes * xp.take(tensor.nested_absmax, nested, axis=0)
    return products + xp.take(xp.reshape(tensor.nested_offset, (-1,)), segments, axis=0)


def quantize(
    values: Array, *, dtype: str, quant_type: QuantType = "nf4", blocksize: int = 64, nested: bool = False
) -> NF4Tensor:
    """Quantises an array in row-major order (Q4).

    The numbers of a block are multiplied by 1 / absmax, rounded to fp32, and get the nearest code. A number halfway
    between two codes gets the lower one. A block of zeros decodes to zeros.

    Args:
        values: finite, of any shape, fp32, or narrower.
        dtype: the dtype to decode to: "float32", "bfloat16" or "float16".
        quant_type: "nf4" or "fp4".
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        nested: whether absmax is quantised too: to 8 bits, in one segment.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_quantize(values, dtype, quant_type, blocksize, nested)
    xp = array_namespace(values)
    flat = xp.astype(xp.reshape(values, (-1,)), xp.float32)
    scaled, absmax = _scaled(flat, blocksize)
    codes = _nearest(scaled, CODES[quant_type])
    zero = CODES[quant_type].index(0.0)
    packed = pack(xp.astype(codes, xp.uint8), zero)
    tensor = NF4Tensor(
        packed, absmax, shape=tuple(values.shape), dtype=dtype, quant_type=quant_type, blocksize=blocksize
    )
    return _with_nested_absmax(tensor) if nested else tensor


def _with_nested_absmax(tensor: NF4Tensor) -> NF4Tensor:
    """Quantises absmax to 8 bits: subtracts its mean, then quantises block by block with `dynamic_code`."""
    absmax = tensor.absmax
    xp, where = array_namespace(absmax), device(absmax)
    mean = xp.sum(xp.astype(absmax, xp.float64)) / max(1, absmax.shape[0])
    offset = xp.astype(xp.asarray(mean, device=where), xp.float32)
    scaled, nested_absmax = _scaled(absmax - offset, NESTED_BLOCKSIZE)
    code = dynamic_code()
    return replace(
        tensor,
        absmax=xp.astype(_nearest(scaled, code), xp.uint8),
        nested_absmax=nested_absmax,
        nested_code=xp.asarray(code, dtype=xp.float32, device=where),
        nested_offset=offset,
        nested_blocksize=NESTED_BLOCKSIZE,
    )


def dynamic_code() -> tuple[float, ...]:
    """The 256 numbers of the 8-bit code of nested statistics, in increasing order.

    A code is a sign, then a run of zeros that gives the power of ten, then bits that divide the interval from 0.1 to 1
    evenly. Its number is the middle of its part. 0 and 1 are added. Source: Dettmers 2016 (arXiv:1511.04561).
    """
    positive = []
    for bits in range(7):
        edges = [0.1 + 0.9 * place / 2**bits for place in range(2**bits + 1)]
        positive += [10.0 ** (bits - 6) * (low + high) / 2 for low, high in pairwise(edges)]
    return tuple(sorted([*positive, *(-value for value in positive), 0.0, 1.0]))


def _scaled(flat: Float[Array, " count"], blocksize: int) -> tuple[Float[Array, " count"], Float[Array, " blocks"]]:
    """Divides numbers by the largest magnitude of their block; returns quotients and magnitudes."""
    xp = array_namespace(flat)
    count = flat.shape[0]
    filled = xp.zeros((-count % blocksize,), dtype=xp.float32, device=device(flat))
    blocks = xp.reshape(xp.concat([flat, filled]), (-1, blocksize))
    absmax = xp.max(xp.abs(blocks), axis=1)
    scaled = blocks * (1.0 / xp.clip(absmax, min=SMALLEST_ABSMAX))[:, None]
    return xp.reshape(xp.clip(scaled, min=-1.0, max=1.0), (-1,))[:count], absmax


def _nearest(scaled: Float[Array, " count"], code: tuple[float, ...]) -> Array:
    """The code nearest to each number; of two equally near codes, that of the lower number."""
    xp = array_namespace(scaled)
    where = device(scaled)
    numbers = sorted(set(code))
    table = xp.asarray(numbers, dtype=xp.float32, device=where)
    codes = xp.asarray([code.index(number) for number in numbers], device=where)
    midpoints = (table[1:] + table[:-1]) / 2.0
    return xp.take(codes, xp.searchsorted(midpoints, scaled, side="left"), axis=0)
