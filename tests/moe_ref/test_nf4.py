"""NF4 and FP4 by hand: bytes, blocks, nested statistics, ties. Bad arguments are in test_nf4_validation.py."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref import nf4
from moe_ref.nf4 import (
    FP4_CODE,
    NF4_CODE,
    absmax_of,
    decode,
    decode_expert,
    dynamic_code,
    pack,
    quantize,
    unpack,
)
from moe_ref.types import NF4Tensor


def u8(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint8)


def f32(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


# Decoding --------------------------------------------------------------------------------------------------------


def test_the_high_nibble_comes_first() -> None:
    """Q1."""
    assert unpack(u8(0x7F, 0x0E), 4).tolist() == [7, 15, 0, 14]
    assert unpack(u8(0x7F, 0x0E), 3).tolist() == [7, 15, 0]
    assert pack(u8(7, 15, 0), last=9).tolist() == [0x7F, 0x09]


def test_codes() -> None:
    """Q1: NF4 rises from -1 to 1, and code 7 is 0; FP4 is sign and magnitude, and both its zeros are 0."""
    assert sorted(NF4_CODE) == list(NF4_CODE)
    assert NF4_CODE[7] == 0
    assert all(float(np.float32(value)) == value for value in NF4_CODE)
    bits = [np.array(half, dtype=">f4").tobytes().hex(" ", 4) for half in (NF4_CODE[:8], NF4_CODE[8:])]
    assert bits[0] == "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
    assert bits[1] == "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    assert [12 * value for value in FP4_CODE[:8]] == [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert all(FP4_CODE[code + 8] == -FP4_CODE[code] for code in range(8))
    assert not np.signbit(FP4_CODE[8])


def test_blocks_straddle_rows() -> None:
    """Q1: block 1 begins in the middle of row 1."""
    t = NF4Tensor(u8(*[0xFF] * 24), f32(1, 2), shape=(3, 16), dtype="float32", blocksize=32)
    assert decode(t).tolist() == [[1.0] * 16, [1.0] * 16, [2.0] * 16]
    t = NF4Tensor(u8(*[0xFF] * 30), f32(1, 2), shape=(3, 20), dtype="float32", blocksize=32)
    assert decode(t).tolist() == [[1.0] * 20, [1.0] * 12 + [2.0] * 8, [2.0] * 20]


def test_a_byte_straddles_experts() -> None:
    """Q1: three numbers for each expert; the second begins with a low nibble."""
    t = NF4Tensor(u8(0xF7, 0x0F, 0x70), f32(1), shape=(2, 1, 3), dtype="float32")
    assert decode_expert(t, 0).tolist() == [[1.0, 0.0, -1.0]]
    assert decode_expert(t, 1).tolist() == [[1.0, 0.0, -1.0]]


def test_one_product_and_one_rounding() -> None:
    """Q2: the scale 1 + 2**-8 is not rounded to bf16 before the product, and the product is fp32, not fp64."""
    scale = np.float32(1 + 2.0**-8 + 2.0**-9)
    t = NF4Tensor(u8(0xF1), f32(scale), shape=(2,), dtype="bfloat16")
    in_fp32 = np.float32(NF4_CODE[1]) * scale
    rounded = torch.tensor([float(scale), float(in_fp32)]).bfloat16().float().tolist()
    assert decode(t).tolist() == rounded == [1 + 2.0**-7, -0.69921875]
    # fp32 rounds the next product down to a tie of bf16, which goes to the even neighbour; exactly, it is above
    scale = f32(1.3886116743087769)
    assert float(NF4_CODE[14]) * float(scale[0]) > float(np.float32(NF4_CODE[14]) * scale[0]) == 1 + 2.0**-8
    assert decode(NF4Tensor(u8(0xE0), scale, shape=(1,), dtype="bfloat16")).tolist() == [1.0]


def test_nested_statistics_round_twice() -> None:
    """Q3: the product loses its last bit before the offset is added; a fused multiply-add would keep it."""
    code = np.zeros(256, dtype=np.float32)
    code[3] = 1 + 2.0**-12
    nested = {"nested_absmax": f32(1 + 2.0**-12), "nested_code": code, "nested_offset": np.float32(2.0**-26)}
    t = NF4Tensor(u8(0xF7), u8(3), **nested, shape=(2,), dtype="float32")
    fused = np.float32((1 + 2.0**-12) ** 2 + 2.0**-26)
    assert float(fused) == 1 + 2.0**-11 + 2.0**-23
    assert absmax_of(t).tolist() == [1 + 2.0**-11]
    in_torch = t.map(lambda array: torch.tensor(array))
    assert absmax_of(in_torch).tolist() == [1 + 2.0**-11]


def test_nested_blocks_begin_anew_in_each_segment() -> None:
    """Q5: three blocks to an expert and nested blocks of two: the third block's scale is its own."""
    code = np.arange(256, dtype=np.float32)
    t = NF4Tensor(
        u8(*[0xFF] * 96),
        u8(1, 1, 1, 1, 1, 1),
        nested_absmax=f32(1, 10, 100, 1000),
        nested_code=code,
        nested_offset=f32(0.5, 0.25),
        shape=(2, 1, 96),
        dtype="float32",
        blocksize=32,
        nested_blocksize=2,
    )
    assert absmax_of(t).tolist() == [1.5, 1.5, 10.5, 100.25, 100.25, 1000.25]
    assert decode_expert(t, 1)[0, ::32].tolist() == [100.25, 100.25, 1000.25]


def test_transposed_bytes() -> None:
    stored = NF4Tensor(u8(0xF7, 0x07, 0x70), f32(2), shape=(1, 2, 3), dtype="float32")
    assert decode(stored).tolist() == [[[2.0, 0.0, -2.0], [0.0, 0.0, -2.0]]]
    view = stored.transpose(1, 2)
    assert (view.shape, view.stored_shape, view.transposed) == ((1, 3, 2), (1, 2, 3), True)
    assert decode(view).tolist() == [[[2.0, 0.0], [0.0, 0.0], [-2.0, -2.0]]]
    assert decode_expert(view, 0).tolist() == decode(view)[0].tolist()
    back = view.transpose(-1, -2)
    assert (back.shape, back.transposed) == (stored.shape, False)


@pytest.mark.parametrize("dimensions", [(0, 1), (0, 2), (1, 1), (-1, 0)])
def test_only_the_last_two_dimensions_swap(dimensions: tuple[int, int]) -> None:
    t = NF4Tensor(u8(0), f32(1), shape=(1, 1, 1), dtype="float32")
    with pytest.raises(ValueError, match=f"^{re.escape(f'dimensions={dimensions}: must be the last two of 3')}$"):
        t.transpose(*dimensions)


def test_one_dimension_does_not_swap() -> None:
    with pytest.raises(ValueError, match=r"^dimensions=\(0, 0\): must be the last two of 1$"):
        NF4Tensor(u8(0), f32(1), shape=(1,), dtype="float32").transpose(0, 0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (0, 2, 3)])
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_at_all(shape: tuple[int, ...], nested: bool) -> None:
    t = quantize(np.zeros(shape, dtype=np.float32), dtype="bfloat16", nested=nested)
    assert decode(t).shape == shape
    assert (t.packed.shape, t.absmax.shape) == ((0,), (0,))
    assert decode(t.map(lambda array: torch.tensor(array))).shape == shape


def test_attributes() -> None:
    t = NF4Tensor(u8(0, 0, 0), f32(1), shape=(1, 2, 3), dtype="float32")
    assert (t.ndim, t.size, t.device, t.segments) == (3, 6, "cpu", 1)
    assert list(t.arrays()) == ["packed", "absmax"]


def test_places_past_2_31_elements() -> None:
    """Q1, E5: a window past 2**32 elements, over bytes and scales that exist once and are repeated by strides."""
    count, blocksize = 2**32 + 96, 4096
    packed = np.broadcast_to(u8(0xF7), count // 2)
    blocks = -(-count // blocksize)
    nested_absmax = f32(*range(1, -(-blocks // 256) + 1))
    t = NF4Tensor(
        packed,
        np.broadcast_to(u8(1), blocks),
        nested_absmax,
        np.ones(256, dtype=np.float32),
        np.float32(0),
        shape=(1, 1, count),
        dtype="float32",
        blocksize=blocksize,
    )
    window = nf4._decode(t, 2**32 - 4097, 2**32 + 3)
    last = 2**32 // blocksize // 256  # the nested block that begins at 2**32
    assert window[:2].tolist() == [0.0, last]
    assert window[-4:].tolist() == [0.0, last + 1, 0.0, last + 1]
    assert window.shape == (4100,)


# Quantising ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_take_the_lower_code(quant_type: Any) -> None:
    """Q4: the upper code is for numbers strictly above the midpoint, in fp32."""
    code = {"nf4": NF4_CODE, "fp4": FP4_CODE}[quant_type]
    table = np.unique(np.float32(code))
    midpoints = (table[1:] + table[:-1]) / np.float32(2)
    above = np.nextafter(midpoints, np.float32(2))
    below = np.nextafter(midpoints, np.float32(-2))
    for numbers, expected in ((below, table[:-1]), (midpoints, table[:-1]), (above, table[1:])):
        t = quantize(np.concatenate([f32(1), numbers]), dtype="float32", quant_type=quant_type)
        assert decode(t)[1:].tolist() == expected.tolist()


def test_the_reciprocal_is_rounded_before_the_product() -> None:
    """Q4: a number that a division would put on a tie."""
    number = float.fromhex("-0x1.69495ap+0")
    assert quantize(f32(31, number), dtype="float32").packed.tolist() == [0xF7]


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_a_block_of_zeros_and_the_last_nibble(quant_type: Any, byte: int) -> None:
    """Q4: zeros decode to zeros, and the spare nibble is the code of zero."""
    t = quantize(f32(*[0.0] * 32, 5.0), dtype="float16", quant_type=quant_type, blocksize=32)
    assert t.packed[:-1].tolist() == [byte] * 16
    assert t.packed[-1] & 15 == byte & 15
    assert t.absmax.tolist() == [0.0, 5.0]
    assert decode(t).tolist() == [0.0] * 32 + [5.0]


def test_quantizing_takes_numbers_in_order() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    t = quantize(values.T, dtype="float32")
    assert t.shape == (4, 3)
    assert (t.packed == quantize(np.ascontiguousarray(values.T), dtype="float32").packed).all()


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_nested_offset_is_the_mean(library: Any) -> None:
    """Q3: four scales 1, 2, 3 and 6; their distances from 3 are exact at the 8-bit code's ends."""
    values = np.repeat(f32(1, 2, 3, 6), 32)
    t = quantize(library(values), dtype="float32", blocksize=32, nested=True)
    assert float(t.nested_offset) == 3.0
    assert t.nested_absmax.tolist() == [3.0]
    assert t.absmax.tolist()[2:] == [127, 255]
    assert absmax_of(t).tolist()[2:] == [3.0, 6.0]


def test_dynamic_code() -> None:
    code = dynamic_code()
    assert len(code) == len(set(code)) == 256
    assert list(code) == sorted(code)
    assert (code[0], code[127], code[255]) == (-(1 + 0.9859375) / 2, 0.0, 1.0)
    assert all(-value in code for value in code if value not in (0.0, 1.0))


def test_numbers_that_are_not_finite() -> None:
    """Q4: the caller promises finite values. Others affect their own block only."""
    values = np.ones((3, 64), dtype=np.float32)
    values[0, 3], values[1, 3] = np.nan, np.inf
    with np.errstate(all="ignore"):
        found = decode(quantize(values, dtype="float32"))
    assert not np.isfinite(found[:2]).all(axis=1).any()
    assert (found[2] == 1.0).all()
