"""Quantising to MXFP4 (M1): the nearest code by brute force; in torch, piece by piece, the specification's bits."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from executors import mxfp4
from executors.mxfp4 import quantization
from moe_ref import mxfp4 as specification
from random_mxfp4 import DTYPES, same_arrays


@st.composite
def dense(draw: st.DrawFn) -> Tensor:
    """Numbers of any strides: some of them zero, tiny, huge, or half way between codes."""
    rows = draw(st.lists(st.integers(0, 5), max_size=2), label="rows")
    width = 32 * draw(st.integers(0, 4), label="blocks of a row")
    dtype = getattr(torch, draw(st.sampled_from(DTYPES), label="dtype"))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    step = draw(st.sampled_from([1, 2]), label="step")
    values = torch.randn([*rows, width * step], generator=generator)
    kind = draw(st.sampled_from(["any", "ties", "zeros", "tiny", "huge", "mixed"]), label="kind")
    if kind == "ties":
        values = torch.randint(-48, 48, values.shape, generator=generator) / 4
    elif kind == "mixed":
        values = values * 2.0 ** torch.randint(-140, 120, values.shape, generator=generator)
    elif kind != "any":
        values = values * {"zeros": 0.0, "tiny": 2.0**-140, "huge": 2.0**120}[kind]
    values = torch.nan_to_num(values.to(dtype), posinf=1.0, neginf=-1.0)[..., ::step]
    return values.mT.contiguous().mT if values.ndim > 1 and draw(st.booleans(), label="transposed") else values


@given(values=dense())
def test_the_nearest_code_by_brute_force(values: Tensor) -> None:
    """M1: no code is nearer; of two equally near codes it is the even one. The arithmetic is exact."""
    numbers = values.double().numpy()
    found = specification.quantize(np.ascontiguousarray(values.float().numpy()))
    scales = np.repeat(specification.scale_of(found.scales), specification.BLOCKSIZE, axis=-1)
    distances = np.abs(np.abs(numbers / scales)[..., None] - specification.POSITIVE)
    nearest = distances == distances.min(axis=-1, keepdims=True)
    even = nearest & (np.arange(8) % 2 == 0)
    expected = np.where(even.any(axis=-1), even.argmax(axis=-1), nearest.argmax(axis=-1))
    codes = specification.unpack(found.blocks).reshape(numbers.shape)
    assert (codes & 7 == expected).all()
    assert (codes >> 3 == (numbers < 0)).all()
    largest = np.abs(numbers).reshape(*found.scales.shape, 32).max(axis=-1)
    scaled = largest / specification.scale_of(found.scales)
    assert ((scaled < 8) & ((scaled >= 4) | (found.scales == 0))).all()


@given(values=dense(), dtype=st.sampled_from(DTYPES), piece=st.sampled_from([64, 2**20]))
@example(torch.full((32,), torch.finfo(torch.float32).max), "float32", 64)
@example(torch.full((1, 32), -1e-45), "float32", 64)
def test_bits_are_the_specifications(values: Tensor, dtype: str, piece: int) -> None:
    """M1, in pieces of any size, whatever the strides."""
    with mock.patch.dict(quantization.PIECES, cpu=piece):
        found = mxfp4.quantize_tensor(values, dtype=dtype)
    same_arrays(found, specification.quantize(values.contiguous(), dtype=dtype))
