"""MXFP4 by hand: bytes, exponents, roundings, ties. Bad arguments are in test_mxfp4_validation.py."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from executors import _decode
from moe_ref import mxfp4, packed
from moe_ref.mxfp4 import E2M1_CODE, decode, decode_expert, quantize, scale_of, unpack
from moe_ref.types import MXFP4Tensor
from random_mxfp4 import DTYPES, block, every_byte, in_torch, random_mxfp4, same_arrays, u8
from random_nf4 import equal_bits

F32_MAX = float(np.finfo(np.float32).max)


def f32(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


# Decoding --------------------------------------------------------------------------------------------------------


def test_the_low_nibble_comes_first() -> None:
    """M1: the low nibble comes first, unlike in NF4."""
    assert unpack(u8(0x7F, 0x0E)).tolist() == [15, 7, 14, 0]
    assert mxfp4.pack(u8(15, 7, 14, 0)).tolist() == [0x7F, 0x0E]
    assert decode(block(2, 7)).tolist()[:3] == [1.0, 6.0, 0.0]


def test_codes_are_sign_exponent_and_mantissa() -> None:
    """M1: s ee m; exponent 0 is subnormal, with the value of mantissa / 2, others are 2 ** (ee - 1) * (1 + m / 2)."""
    for code, value in enumerate(E2M1_CODE):
        exponent, mantissa = (code >> 1) & 3, Fraction(code & 1, 2)
        magnitude = mantissa if exponent == 0 else (1 + mantissa) * 2 ** (exponent - 1)
        assert abs(value) == magnitude
        assert np.signbit(value) == (code >= 8)
    assert decode(block(*range(16))).tolist()[:16] == list(E2M1_CODE)
    assert np.signbit(decode(block(8))[0])


def test_the_bias_is_127() -> None:
    """M1: exponent 127 is 1; 0 is 2**-127, which is subnormal and not 0; 254 is 2**127."""
    assert [float(n) for n in scale_of(u8(0, 1, 126, 127, 128, 254))] == [
        2.0**-127,
        2.0**-126,
        0.5,
        1.0,
        2.0,
        2.0**127,
    ]
    assert [decode(block(2, scale=scale))[0] for scale in (0, 126, 254)] == [2.0**-127, 0.5, 2.0**127]


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponent_255_is_nan(dtype: str) -> None:
    """M1: for every code, also 0, and only in its own block."""
    t = MXFP4Tensor(np.zeros((2, 16), np.uint8), u8(255, 127), dtype=dtype)
    assert np.isnan(decode(t)[:32]).all()
    assert (decode(t)[32:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_exponent(dtype: str) -> None:
    """M1: exactly code * 2 ** (exponent - 127), then torch's own rounding from fp32, where each product is exact."""
    t = every_byte(dtype)
    pairs = np.array([[E2M1_CODE[byte & 15], E2M1_CODE[byte >> 4]] for byte in range(256)]).reshape(-1)
    with np.errstate(over="ignore"):
        exact = (pairs * 2.0 ** (np.arange(255)[:, None] - 127)).astype(np.float32)
    expected = torch.from_numpy(exact).to(getattr(torch, dtype)).float().numpy()
    assert equal_bits(decode(t)[0, :255], expected).all()
    assert np.isnan(decode(t)[0, 255]).all()


def test_the_ends_of_dtypes() -> None:
    """M1: too large numbers become infinite, too small ones round to even, and the sign stays."""
    assert decode(block(7, 15, 3, scale=254)).tolist()[:3] == [np.inf, -np.inf, 1.5 * 2.0**127]
    assert decode(block(7, 15, 3, scale=254, dtype="bfloat16")).tolist()[:3] == [np.inf, -np.inf, 1.5 * 2.0**127]
    assert decode(block(7, 6, scale=140, dtype="float16")).tolist()[:2] == [6 * 2.0**13, 2.0**15]
    assert decode(block(7, 14, scale=141, dtype="float16")).tolist()[:2] == [np.inf, -np.inf]
    # the smallest number of fp16 is 2**-24; halves of it go to even multiples: 0.5 to 0, 1.5 to 2
    assert decode(block(1, 2, 3, 9, scale=103, dtype="float16")).tolist()[:4] == [0.0, 2.0**-24, 2.0**-23, -0.0]
    assert np.signbit(decode(block(1, 2, 3, 9, scale=103, dtype="float16"))[3])
    assert decode(block(1, scale=0, dtype="bfloat16"))[0] == 2.0**-128


def test_a_block_is_32_numbers_of_a_row() -> None:
    """M1: two rows of two blocks, each with its own scale."""
    t = MXFP4Tensor(np.full((2, 2, 16), 0x22, np.uint8), np.array([[127, 128], [129, 130]], np.uint8), dtype="float32")
    assert t.shape == (2, 64)
    assert decode(t)[:, ::32].tolist() == [[1.0, 2.0], [4.0, 8.0]]
    assert decode(t)[:, 31::32].tolist() == [[1.0, 2.0], [4.0, 8.0]]


def test_transposed_view() -> None:
    stored = random_mxfp4(2, 3, 64)
    view = stored.transpose(1, 2)
    assert (view.shape, view.stored_shape, view.transposed) == ((2, 64, 3), (2, 3, 64), True)
    assert view.blocks is stored.blocks
    assert equal_bits(decode(view), decode(stored).swapaxes(1, 2)).all()
    back = view.transpose(-1, -2)
    assert (back.shape, back.transposed) == (stored.shape, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_decodes_alone_as_among_the_others(dtype: str, transposed: bool) -> None:
    """M1, in NumPy and in torch alike; so do the executors, one expert at a time or several in any order."""
    t = random_mxfp4(5, 6, 96, dtype=dtype)
    t = t.transpose(1, 2) if transposed else t
    whole, given = decode(t), in_torch(t)
    assert equal_bits(packed.decode(t), whole).all()
    assert equal_bits(decode(given).numpy(), whole).all()
    experts = torch.tensor([3, 0, 4, 3])
    several = _decode.decode_experts(given, experts)
    assert several.dtype == getattr(torch, dtype)
    assert equal_bits(several.float().numpy(), whole[experts.numpy()]).all()
    for index in range(5):
        assert equal_bits(decode_expert(t, index), whole[index]).all()
        assert equal_bits(packed.decode_expert(given, index).numpy(), whole[index]).all()
        assert equal_bits(_decode.decode_expert(given, index).float().numpy(), whole[index]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_executors_decode_every_byte_under_every_exponent(dtype: str) -> None:
    """M1."""
    t = every_byte(dtype)
    found = _decode.decode_expert(in_torch(t), 0).float().numpy()
    assert equal_bits(found, decode(t)[0]).all()


@pytest.mark.parametrize("shape", [(0, 4, 32), (2, 0, 32), (2, 4, 0)])
def test_nothing_at_all(shape: tuple[int, ...]) -> None:
    t = quantize(np.zeros(shape, dtype=np.float32))
    assert decode(t).shape == decode(in_torch(t)).shape == shape
    assert decode(t.transpose(1, 2)).shape == (shape[0], shape[2], shape[1])
    none = _decode.decode_experts(in_torch(t), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, *shape[1:])


def test_strided_bytes_are_read_as_they_stand() -> None:
    large = random_mxfp4(2, 6, 128)
    t = MXFP4Tensor(large.blocks[:, ::2, 1:3], large.scales[:, ::2, 1:3], dtype="float32")
    expected = decode(large)[:, ::2, 32:96]
    assert equal_bits(decode(t), expected).all()
    assert equal_bits(_decode.decode_experts(in_torch(t), torch.arange(2)).numpy(), expected).all()


def test_attributes() -> None:
    t = random_mxfp4(2, 3, 64, dtype="float16")
    assert (t.ndim, t.size, t.device, t.quant_type, t.dtype) == (3, 384, "cpu", "mxfp4", "float16")
    assert list(t.arrays()) == ["blocks", "scales"]
    assert t.codes is t.blocks


# Quantising ------------------------------------------------------------------------------------------------------


def test_the_largest_number_of_a_block_decides_on_its_scale() -> None:
    """M1: the largest scaled magnitude is from 4 to below 8; numbers beyond 6 become 6."""
    for largest, scale, found in ((4.0, 127, 4.0), (6.0, 127, 6.0), (7.9, 127, 6.0), (8.0, 128, 8.0), (0.9, 124, 0.75)):
        t = quantize(f32(-largest, *[0.0] * 31), dtype="float32")
        assert t.scales.tolist() == [scale]
        assert decode(t)[0] == -found


def test_ties_go_to_an_even_mantissa() -> None:
    """M1: the midpoints, and the fp32 numbers on both sides of them."""
    table = f32(0, 0.5, 1, 1.5, 2, 3, 4, 6)
    midpoints = (table[1:] + table[:-1]) / 2
    even = f32(0, 1, 1, 2, 2, 4, 4)
    below, above = np.nextafter(midpoints, f32(0)), np.nextafter(midpoints, f32(9))
    for numbers, expected in ((below, table[:-1]), (midpoints, even), (above, table[1:])):
        values = np.concatenate([numbers, -numbers, f32(4, *[0] * 17)])
        found = decode(quantize(values, dtype="float32"))
        assert found[:14].tolist() == [*expected, *-expected]


def test_a_block_of_zeros() -> None:
    """M1: the smallest scale; a zero has the code 0, whatever its sign."""
    t = quantize(f32(*[0.0] * 31, -0.0))
    assert (t.scales.tolist(), t.blocks.any()) == ([0], False)


def test_small_negative_numbers_keep_their_sign() -> None:
    t = quantize(f32(4, -0.2, 0.2, -1e-45, *[0] * 28), dtype="float32")
    assert unpack(t.blocks)[0, :4].tolist() == [6, 8, 0, 8]


def test_the_ends_of_fp32() -> None:
    """M1: the smallest scale is 2**-127; the smallest numbers then become 0."""
    t = quantize(f32(F32_MAX, -F32_MAX, *[0] * 30), dtype="float32")
    assert (t.scales.tolist(), decode(t)[:2].tolist()) == ([252], [6 * 2.0**125, -6 * 2.0**125])
    t = quantize(f32(2.0**-149, 2.0**-128, 2.0**-126, *[0] * 29), dtype="float32")
    assert (t.scales.tolist(), decode(t)[:3].tolist()) == ([0], [0.0, 2.0**-128, 2.0**-126])


def test_what_is_in_mxfp4_stays_as_it_is() -> None:
    """M1: a block without a code of 4 or 6 gets a smaller scale, with which its numbers have codes too."""
    t = random_mxfp4(64, 4, 96, exponents=(3, 253))
    t = replace(
        t, blocks=t.blocks & np.random.default_rng(0).choice(u8(0xFF, 0xDD, 0xBB, 0x99), t.scales.shape)[..., None]
    )
    again = quantize(decode(t), dtype="float32")
    assert (again.scales != t.scales).any()
    assert (decode(again) == decode(t)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_torch_quantize_alike(dtype: str) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 5, 64)) * 10.0).to(getattr(torch, dtype))
    found = quantize(values, dtype=dtype)
    same_arrays(found, quantize(values.float().numpy(), dtype=dtype))


def test_noise_of_normal_numbers() -> None:
    """So weights in MXFP4 keep the scale that error bars require."""
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    found = decode(quantize(values))
    assert 0.10 < np.sqrt(np.mean((found - values) ** 2)) < 0.13
    assert abs(np.std(found) - 1) < 0.03
