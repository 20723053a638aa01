"""NF4 and FP4 (clauses Q1 to Q5): decoding equals a loop of one line for every shape, and experts stay separate.

test_nf4_library.py tests that bitsandbytes agrees.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moe_ref.nf4 import CODES, absmax_of, decode, decode_expert, pack, unpack
from moe_ref.types import NF4Tensor
from random_nf4 import SEEDS, decoded, equal_bits, in_torch, tensors


@given(tensor=tensors())
def test_decoding_is_a_loop_of_one_line(tensor: NF4Tensor) -> None:
    """Q1, Q2, Q3, element by element, against NumPy's own fp32 and torch's own rounding from fp32."""
    absmax = tensor.absmax
    code = np.array(CODES[tensor.quant_type], dtype=np.float32)
    products = np.empty(tensor.size, dtype=np.float32)
    with np.errstate(all="ignore"):
        if tensor.nested_absmax is not None:
            scales = np.repeat(tensor.nested_absmax, 256)[: len(absmax)]
            absmax = tensor.nested_code[absmax] * scales + tensor.nested_offset
        for i in range(tensor.size):
            byte = int(tensor.packed[i // 2])
            products[i] = code[byte & 15 if i % 2 else byte >> 4] * absmax[i // tensor.blocksize]
    rounded = torch.from_numpy(products).to(getattr(torch, tensor.dtype)).float().numpy().reshape(tensor.stored_shape)
    expected = rounded.swapaxes(-1, -2) if tensor.transposed else rounded
    actual = decoded(tensor)
    assert actual.shape == tensor.shape
    assert equal_bits(actual, expected).all(), f"{actual=}, but should be {expected=}"


@given(tensor=tensors(segments=True, ranks=(3, 2, 1)))
def test_numpy_and_torch_decode_alike(tensor: NF4Tensor) -> None:
    """Q2: decoding is bit-equal everywhere."""
    assert equal_bits(decoded(tensor), decode(in_torch(tensor)).numpy()).all()


@given(tensor=tensors(segments=True, ranks=(3,)))
def test_an_expert_decodes_alone_as_among_the_others(tensor: NF4Tensor) -> None:
    """Q1, Q5: blocks, bytes and nested blocks may straddle experts; segments may not."""
    whole = decoded(tensor)
    with np.errstate(all="ignore"):
        alone = np.stack([decode_expert(tensor, e) for e in range(tensor.shape[0])])
    assert equal_bits(alone, whole).all()


@given(tensor=tensors(segments=True, ranks=(3, 2)))
def test_transposing_only_changes_the_view(tensor: NF4Tensor) -> None:
    other = tensor.transpose(-1, -2)
    assert other.packed is tensor.packed
    assert equal_bits(decoded(other), decoded(tensor).swapaxes(-1, -2)).all()


@given(count=st.integers(0, 70), last=st.integers(0, 15), seed=SEEDS)
def test_packing_loses_nothing(count: int, last: int, seed: int) -> None:
    """Q1."""
    codes = np.random.default_rng(seed).integers(0, 16, count, dtype=np.uint8)
    packed = pack(codes, last)
    assert packed.shape == (ceil(count / 2),)
    assert (unpack(packed, count) == codes).all()
    assert count % 2 == 0 or packed[-1] & 15 == last


@given(tensor=tensors(segments=True, ranks=(3,)))
def test_segments_are_experts_on_their_own(tensor: NF4Tensor) -> None:
    """Q5: with an offset for each expert, each has its own nested blocks, and its plain absmax joins exactly."""
    experts = tensor.shape[0]
    own = tensor.size // experts
    if own % tensor.blocksize:
        return
    if tensor.segments == 1:
        tensor = replace(tensor, nested_offset=None, nested_absmax=None, nested_code=None)
        tensor = replace(tensor, absmax=np.ones(tensor.size // tensor.blocksize, dtype=np.float32))
    parts = {n: array.reshape(experts, -1) for n, array in tensor.arrays().items() if n != "nested_code"}
    alone = []
    for e in range(experts):
        arrays = {n: part[e] if n != "nested_offset" else part[e][0] for n, part in parts.items()}
        alone.append(decoded(replace(tensor, shape=(1, *tensor.shape[1:]), **arrays)))
    assert equal_bits(np.concatenate(alone), decoded(tensor)).all()
    with np.errstate(all="ignore"):
        plain = replace(tensor, absmax=absmax_of(tensor), nested_absmax=None, nested_code=None, nested_offset=None)
    assert equal_bits(decoded(plain), decoded(tensor)).all()


@given(experts=st.integers(2, 5), own=st.one_of(st.integers(1, 100), st.sampled_from([128, 256])), seed=SEEDS)
@example(experts=2, own=20, seed=0)  # two blocks, alone and joined, but not the same two
@example(experts=2, own=64, seed=0)
def test_joining_is_exact_only_for_multiples_of_blocksize(experts: int, own: int, seed: int) -> None:
    """Q5: otherwise the arrays do not fit, or they fit and mean something else."""
    rng = np.random.default_rng(seed)
    blocks = ceil(own / 32)
    packed = rng.choice(np.array([0x12, 0x9A, 0xEF], dtype=np.uint8), (experts, ceil(own / 2)))  # no code of zero
    absmax = np.arange(1, experts * blocks + 1, dtype=np.float32).reshape(experts, blocks)
    form = {"dtype": "float32", "blocksize": 32}
    alone = [decode(NF4Tensor(p, a, shape=(own,), **form)) for p, a in zip(packed, absmax, strict=True)]
    joined = NF4Tensor(packed.reshape(-1), absmax.reshape(-1), shape=(experts, own), **form)
    try:
        exact = bool(equal_bits(decode(joined), np.stack(alone)).all())
    except ValueError:
        exact = False
    assert exact == (own % 32 == 0)
