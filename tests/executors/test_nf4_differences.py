"""Where bitsandbytes differs from the specification in 4 bits (Q6): each difference with its smallest example.

A test asserts the specification's answer against arithmetic done by hand. What the library answers depends on its
version and on the processor: where it agrees, the test says so by skipping, and the excuse of that name in
property_tests/test_nf4_library.py may go. Where it says a third thing, the test skips too and tells what, but not on
the kind of processor that they were measured on (`library_machine`). All differences are in docs/known-differences.md.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

from library_machine import differs
from moe_ref.nf4 import NF4_CODE, absmax_of, decode, dynamic_code, quantize, unpack
from moe_ref.types import NF4Tensor
from random_nf4 import library_decodes, on_cpu

FF = 0xFF  # twice code 15, which stands for 1
MINUS_ZERO = -0.0


def tensor(packed: list[int], absmax: list[float], shape: tuple[int, ...], **form: Any) -> NF4Tensor:
    arrays = np.array(packed, dtype=np.uint8), np.array(absmax, dtype=np.float32)
    return NF4Tensor(*arrays, shape=shape, **{"dtype": "float32", **form})


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def demand(library: Any, right: Any, wrong: Any) -> None:
    """That the library says ``wrong``; skips, and tells, where it is right, or another processor says a third thing."""
    if repr(library) == repr(right):
        pytest.skip(f"bitsandbytes {version('bitsandbytes')} is right here, on this processor")
    if repr(library) != repr(wrong):
        differs(f"{library}, not {wrong}; right is {right}")


def test_rows_of_partial_blocks() -> None:
    """Q1, Q6: of three rows of 16, with blocks of 32, the third is the second block's; the library takes the first."""
    t = tensor([FF] * 24, [1.0, 2.0], (3, 16), blocksize=32)
    right = [1.0] * 32 + [2.0] * 16  # by its place in the flattened tensor, not in the row
    assert decode(t).reshape(-1).tolist() == right
    demand(library_decodes(bitsandbytes(), t).tolist(), right, [1.0] * 48)


@pytest.mark.parametrize(
    ("absmax", "right"),
    [(2.0**-127, 2.0**-127), (2.0**-126 - 2.0**-149, 2.0**-126)],
    ids=["subnormal", "rounds to the smallest normal number"],
)
def test_subnormals_flushed(absmax: float, right: float) -> None:
    """Q2, Q6: bf16 has subnormal numbers, 2**-133 apart; the library, on AVX-512, has none."""
    t = tensor([FF] * 8, [absmax], (1, 16), dtype="bfloat16")
    assert right == round(absmax * 2.0**133) * 2.0**-133
    assert decode(t).tolist() == [[right] * 16]
    demand(library_decodes(bitsandbytes(), t).tolist(), [right] * 16, [0.0] * 16)


def of_the_library(packed: torch.Tensor, t: NF4Tensor) -> torch.Tensor:
    library = bitsandbytes()
    form = {"blocksize": t.blocksize, "quant_type": t.quant_type, "dtype": torch.float32}
    return library.dequantize_4bit(packed, library.QuantState(torch.from_numpy(t.absmax), torch.Size(t.shape), **form))


def test_a_first_dimension_of_1() -> None:
    """Q6: one row of two numbers is one byte, (1, 1); the library returns a column."""
    t = tensor([0x7F], [1.0], (1, 2))
    assert decode(t).tolist() == [[NF4_CODE[7], NF4_CODE[15]]] == [[0.0, 1.0]]
    demand(of_the_library(torch.from_numpy(t.packed)[:, None], t).tolist(), [[0.0, 1.0]], [[0.0], [1.0]])


def test_a_first_dimension_of_1_in_three_dimensions() -> None:
    """Q6: an expert of one row, its bytes in a row; the library refuses to transpose three dimensions."""
    t = tensor([FF] * 8, [1.0], (1, 4, 4))
    assert decode(t).tolist() == [[[1.0] * 4] * 4]
    packed = torch.from_numpy(t.packed)[None]
    try:
        found: Any = of_the_library(packed, t).tolist()
    except RuntimeError:
        found = "RuntimeError"
    demand(found, [[[1.0] * 4] * 4], "RuntimeError")


def test_one_dimension_becomes_two() -> None:
    """Q6: numbers in one dimension come back as a row of a matrix."""
    t = tensor([0x7F, 0x0F], [1.0], (4,))
    assert decode(t).shape == (4,)
    demand(tuple(of_the_library(torch.from_numpy(t.packed)[:, None], t).shape), (4,), (1, 4))


def test_negative_zero_of_fp4() -> None:
    """Q1, Q6: code 8 of FP4 is 0; the library's answer has a sign where rows are not a multiple of 16 numbers."""
    t = tensor([0x80, 0x00], [1.0], (2, 2), quant_type="fp4")
    right = [0.0, 0.0, 0.0, 0.0]
    assert repr(decode(t).reshape(-1).tolist()) == repr(right)
    demand(library_decodes(bitsandbytes(), t).tolist(), right, [MINUS_ZERO, 0.0, 0.0, 0.0])


def test_strided_bytes() -> None:
    """Q6: every second byte of four; the library reads the first two, whatever the strides."""
    t = tensor([0x7F, 0x11, 0x0F, 0x22], [1.0], (4,))
    every_second = NF4Tensor(t.packed[::2], t.absmax, shape=(4,), dtype="float32")
    right = [0.0, 1.0, -1.0, 1.0]  # 7, f, 0, f
    assert decode(every_second).tolist() == right
    found = of_the_library(torch.from_numpy(t.packed)[::2, None], t).reshape(-1).tolist()
    demand(found, right, [0.0, 1.0, NF4_CODE[1], NF4_CODE[1]])  # 7, f, 1, 1


def quantized(values: list[float], **form: Any) -> tuple[NF4Tensor, Callable[[], Any]]:
    """By the specification, and when called by the library: its bytes and state."""
    x = torch.tensor(values)
    blocksize, quant_type = form.get("blocksize", 64), form.get("quant_type", "nf4")
    library = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": form.get("nested", False)}
    return quantize(x.numpy(), dtype="float32", **form), lambda: bitsandbytes().quantize_4bit(x, **library)


def test_scale_of_a_tiny_tail() -> None:
    """Q4: a partial block of zeros has absmax 0; the library writes 1e-38. Both decode to zeros."""
    t, library = quantized([0.0, 0.0])
    assert t.absmax.tolist() == [0.0]
    assert decode(t).tolist() == [0.0, 0.0]
    demand(library()[1].absmax.tolist(), [0.0], [float(np.float32(1e-38))])


def test_blocks_below_1e_38_shrink() -> None:
    """Q4: 4e-39 is 0.4 of 1e-38, so code 12, 0.44; but it is scaled by absmax, 4e-39. The library does the same."""
    t, library = quantized([4e-39] * 64)
    assert unpack(t.packed, 1).tolist() == [12]
    shrunk = float(np.float32(NF4_CODE[12]) * np.float32(4e-39))
    assert decode(t)[0] == shrunk
    packed, state = library()
    theirs, ours = (on_cpu(packed).reshape(-1).tolist(), state.absmax.tolist()), (t.packed.tolist(), t.absmax.tolist())
    if theirs != ours:
        differs(f"{theirs}, not {ours}")


def test_tail_divides() -> None:
    """Q4: 1/31, rounded, times a number is above a midpoint; the number divided by 31 is on it, and takes the lower."""
    number = float.fromhex("-0x1.69495ap+0")
    midpoint = (np.float32(NF4_CODE[6]) + np.float32(NF4_CODE[7])) / np.float32(2)
    assert np.float32(number) * (np.float32(1) / np.float32(31)) > midpoint
    assert np.float32(number) / np.float32(31) == midpoint
    t, library = quantized([31.0, number])
    assert t.packed.tolist() == [0xF7]
    demand(on_cpu(library()[0]).reshape(-1).tolist(), [0xF7], [0xF6])


def test_small_positive_numbers_in_fp4() -> None:
    """Q4: both codes 0 and 8 stand for 0; the specification writes 0, the library 8 for small numbers above 0."""
    t, library = quantized([1.0, 0.001, 0.0, -0.001], quant_type="fp4")
    assert decode(t).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert t.packed.tolist() == [0x30, 0x00]
    demand(on_cpu(library()[0]).reshape(-1).tolist(), [0x30, 0x00], [0x38, 0x00])


def test_nearest_8_bit_code() -> None:
    """Q3, Q4: of 0.00297 and 0.00353, 0.00323 is nearer to the first; the library takes the second."""
    number = 6784 * 2.0**-21
    low, high = (np.float32(dynamic_code()[place]) for place in (146, 147))
    assert number - low < high - number
    scales = [3.0, 2.0 + number, 1.5, 1.5 - number]  # of mean 2, and all sums are exact
    t, library = quantized([value for scale in scales for value in [scale] * 32], blocksize=32, nested=True)
    assert float(t.nested_offset) == 2.0
    assert t.absmax.tolist()[:2] == [255, 146]
    assert absmax_of(t)[1] == low * np.float32(1) + np.float32(2)
    demand(library()[1].absmax.tolist()[:2], [255, 146], [255, 147])


def test_last_bit_of_the_8_bit_code() -> None:
    """Q3: 0.71171875 is between two fp32 numbers, nearer to the lower; the library's arithmetic gives the upper."""
    exact, place = 0.71171875, 234
    low, high = np.float32(exact), np.nextafter(np.float32(exact), np.float32(1))
    assert abs(float(low) - exact) < abs(float(high) - exact)
    t, _ = quantized([1.0], nested=True)
    assert t.nested_code[place] == low
    demand(float(bitsandbytes().create_dynamic_map()[place]), float(low), float(high))
