"""bitsandbytes agrees with the specification of NF4 and FP4, bit for bit, where it is right (clauses Q2 to Q4, Q6).

Where it is wrong, or its answer depends on the processor, elements are excused by name. Each excuse has a pinned
example of that name in tests/executors/test_nf4_differences.py and a section in docs/known-differences.md. On
processors that were not measured the library may be wrong in other ways: tests of its compiled functions then skip and
report what they saw. What the tests assert of moe-ref, and of the library's path in PyTorch, holds on all processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from library_machine import differs
from moe_ref.nf4 import CODES, SMALLEST_ABSMAX, absmax_of, quantize, unpack
from moe_ref.types import NF4Tensor
from random_nf4 import BLOCKSIZES, DTYPES, SEEDS, TYPES, as_stored, equal_bits, library_decodes, on_cpu, tensors

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]
AWAY_FROM_TIES = {"cpu": 2.0**-22, "cuda": 2.0**-19}  # CUDA compares FP4 with midpoints of six digits
LARGEST = {"cpu": 126, "cuda": 100}  # powers of two of what is quantised: CUDA flushes subnormal numbers to zero
NESTED_STEP = 2.0**-15  # the library's 8-bit quantiser on the CPU looks numbers up in a table with such steps
MIDPOINTS = {
    name: (np.unique(np.float32(code))[1:] + np.unique(np.float32(code))[:-1]) / np.float32(2)
    for name, code in CODES.items()
}


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """bitsandbytes.functional, with its compiled fallbacks run eagerly: compiling for each shape takes seconds."""
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):
        yield functional


def excused(tensor: NF4Tensor, device: str) -> dict[str, np.ndarray]:
    """The elements, in storage order, that the library may decode wrongly, by reason."""
    size, blocksize, width = tensor.size, tensor.blocksize, tensor.stored_shape[-1]
    place = np.arange(size)
    looked_up = place // width * (width // blocksize) + place % width // blocksize
    product = as_stored(replace(tensor, dtype="float32"))
    subnormal = np.abs(product) < 2.0**-126
    return {
        "rows_of_partial_blocks": (looked_up != place // blocksize) & (device == "cpu"),
        "subnormals_flushed": subnormal & (device == "cuda" or tensor.dtype == "bfloat16"),
    }


@pytest.mark.parametrize("device", DEVICES)
@given(tensor=tensors())
def test_decoding_equals_the_library(library: Any, device: str, tensor: NF4Tensor) -> None:
    """Q2, Q3, Q6: bit for bit, except excused elements and the sign of FP4's code 8 (negative_zero_of_fp4)."""
    assume(tensor.packed.shape[0] > 1)  # the library takes it for transposed: a_first_dimension_of_1
    theirs = library_decodes(library, tensor, device)
    ours = as_stored(tensor)
    signless = (ours == 0) & (theirs == 0) & (unpack(tensor.packed, tensor.size) == 8) & (tensor.quant_type == "fp4")
    wrong = ~equal_bits(ours, theirs) & ~signless
    for elements in excused(tensor, device).values():
        wrong &= ~elements
    places = np.nonzero(wrong)[0][:5]
    if wrong.any():
        differs(f"at {places}: {ours[places]}, but the library has {theirs[places]} [{tensor.stored_shape}]")


@given(tensor=tensors().filter(lambda tensor: tensor.stored_shape[-1] % 2 == 1))
def test_decoding_equals_the_librarys_path_in_pytorch(library: Any, tensor: NF4Tensor) -> None:
    """Q1, Q2, Q3: that path also decodes rows of odd length, on every processor, bit for bit; nothing is excused."""
    assume(tensor.packed.shape[0] > 1)
    ours, theirs = as_stored(tensor), library_decodes(library, tensor)
    places = np.nonzero(~equal_bits(ours, theirs))[0][:5]
    assert not len(places), f"at {places}: {ours[places]}, but the library has {theirs[places]} [{tensor.stored_shape}]"


@st.composite
def inputs(draw: st.DrawFn, blocksize: int, largest: int) -> np.ndarray:
    """Numbers in fp32 with zeros, ties, and numbers near ties, in blocks with scales from 2**-largest on."""
    count = draw(st.one_of(st.integers(1, 9), st.integers(1, 5 * blocksize)), label="count")
    power = draw(st.integers(-largest, largest), label="power of two")
    factor = draw(st.sampled_from([1.0, 0.75, 1.37]), label="factor")
    kind = draw(st.sampled_from(["normal", "thirds", "ties"]), label="kind")
    rng = np.random.default_rng(draw(SEEDS, label="seed"))
    unit = np.clip(rng.standard_normal(count) / 3, -1, 1)
    if kind == "thirds":
        unit = np.round(unit * 12) / 12
    if kind == "ties":
        unit = rng.choice(np.concatenate([MIDPOINTS["nf4"], MIDPOINTS["fp4"], [0.0]]), count)
    unit[::blocksize] = 1.0
    return (unit * factor * 2.0**power).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data(), quant_type=TYPES, blocksize=BLOCKSIZES, dtype=DTYPES)
def test_quantizing_equals_the_library(
    library: Any, device: str, data: st.DataObject, quant_type: str, blocksize: int, dtype: str
) -> None:
    """Q4: NF4 bit for bit in full blocks; tails and FP4 by the values they stand for, away from ties.

    A number is away from ties if, after scaling, it is farther than AWAY_FROM_TIES * m from each midpoint m of two
    values. There no value is nearer than ours.
    """
    x = torch.tensor(data.draw(inputs(blocksize, LARGEST[device]), label="values"), device=device)
    x = x.to(getattr(torch, dtype))
    assume(torch.isfinite(x).all())
    packed, state = library.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    ours = quantize(x, dtype=dtype, quant_type=quant_type, blocksize=blocksize).map(on_cpu)
    place = np.arange(ours.size)
    full, scale = place < ours.size // blocksize * blocksize, ours.absmax[place // blocksize]
    codes, theirs = unpack(ours.packed, ours.size), unpack(on_cpu(packed).reshape(-1), ours.size)
    scaled = on_cpu(x.double()) / np.maximum(scale, SMALLEST_ABSMAX)
    distance = np.abs(scaled[:, None] - MIDPOINTS[quant_type])
    tie = (distance <= AWAY_FROM_TIES[device] * np.abs(MIDPOINTS[quant_type])).any(axis=1)
    value = np.array(CODES[quant_type])
    assert (tie | (np.abs(scaled - value[codes]) == np.abs(scaled[:, None] - value).min(axis=1))).all()
    wrong = (value[codes] != value[theirs]) & ~tie
    if quant_type == "nf4":
        wrong |= (codes != theirs) & full
    if wrong.any():
        differs(f"at {np.nonzero(wrong)[0][:5]}: {codes[wrong][:5]}, but the library has {theirs[wrong][:5]}")
    expected = ours.absmax.copy()
    if not full[-1] and device == "cpu":
        expected[-1] = max(expected[-1], np.float32(SMALLEST_ABSMAX))  # scale_of_a_tiny_tail
    if (expected != on_cpu(state.absmax)).any():
        differs(f"scales {on_cpu(state.absmax)}, not {expected}")


@pytest.mark.parametrize("device", DEVICES)
@given(blocks=st.one_of(st.integers(1, 9), st.integers(250, 600)), power=st.integers(-20, 20), seed=SEEDS)
def test_nested_statistics_are_no_worse_than_the_librarys(
    library: Any, device: str, blocks: int, power: int, seed: int
) -> None:
    """Q3, Q4: the same mean, except for the order of the sum; our 8-bit code is nearest, the library's within a step.

    A step is 2**-15 of the nested scale: the library looks numbers up in a table (nearest_8_bit_code).
    """
    drawn = np.random.default_rng(seed).standard_normal(32 * blocks) * 2.0**power
    x = torch.tensor(drawn, dtype=torch.float32, device=device)
    form = {"quant_type": "nf4", "blocksize": 32}
    packed, state = library.quantize_4bit(x, compress_statistics=True, **form)
    nested = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "nested_offset": state.offset}
    form |= {"dtype": "float32"}
    theirs = NF4Tensor(packed.reshape(-1), state.absmax, **nested, shape=(32 * blocks,), **form).map(on_cpu)
    ours, plain = (quantize(x, nested=nested, **form).map(on_cpu) for nested in (True, False))
    mean = plain.absmax.astype(np.float64).mean()
    assert abs(ours.nested_offset - mean) <= 2.0**-24 * mean
    apart = np.abs(ours.nested_code.view(np.int32) - theirs.nested_code.view(np.int32))
    rounding = 2.0**-20 * mean + 2.0**-22 * (mean + ours.nested_absmax.max())
    our_error, their_error = (np.abs(absmax_of(tensor) - plain.absmax) for tensor in (ours, theirs))
    assert (our_error <= their_error + rounding).all()
    near = {
        "codes": (ours.packed == theirs.packed).all(),
        "the mean": abs(theirs.nested_offset - mean) <= 2.0**-20 * mean,
        "the 8-bit code": apart.max() <= 1,
        "scales": (their_error <= our_error + NESTED_STEP * ours.nested_absmax.max() + rounding).all(),
    }
    if not all(near.values()):
        differs(f"{', '.join(what for what, close in near.items() if not close)} of nested statistics")
