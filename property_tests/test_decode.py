"""The executors' own decoding gives the specification's bits, by the library's kernel and by the table (Q1 to Q6)."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given

from executors import _decode
from executors._decode import bitsandbytes as _decode_kernel
from executors._decode import table as _decode_table
from moe_ref.nf4 import dynamic_code
from moe_ref.types import NF4Tensor
from narrow_kernel import without_vectors
from random_nf4 import decoded, equal_bits, in_torch, tensors


def many_blocks() -> NF4Tensor:
    """Three experts of 300 nested scales each, with one offset: the second begins inside a nested block."""
    rng = np.random.default_rng(0)
    static = {"shape": (3, 300, 32), "dtype": "bfloat16", "blocksize": 32}
    scales = rng.integers(0, 256, 900, dtype=np.uint8), np.float32([1, 2, 3, 4])
    nested = *scales, np.array(dynamic_code(), dtype=np.float32), np.array(0.5, dtype=np.float32)
    return NF4Tensor(rng.integers(0, 256, 3 * 4800, dtype=np.uint8), *nested, **static)


def partial_last_block() -> NF4Tensor:
    """More codes than one piece, and a last block that ends early and has its own scale."""
    codes = np.random.default_rng(1).integers(0, 256, 4511, dtype=np.uint8)
    return NF4Tensor(codes, np.arange(1, 142, dtype=np.float32), shape=(1, 1, 9021), dtype="float32")


MANY, TAIL = many_blocks(), partial_last_block()
FF = 0xFF  # twice the code of 1
ROWS = NF4Tensor(np.full(48, FF, np.uint8), np.float32([1, 2]), shape=(2, 3, 16), dtype="float32", blocksize=64)
SUBNORMAL = NF4Tensor(np.full(32, FF, np.uint8), np.float32([2.0**-127]), shape=(1, 4, 16), dtype="bfloat16")
ONE_BYTE = NF4Tensor(np.uint8([0x7F]), np.float32([1]), shape=(1, 1, 2), dtype="float32")
CODE_8 = NF4Tensor(np.uint8([0x80, 0]), np.float32([1]), shape=(1, 2, 2), dtype="float32", quant_type="fp4")
NEGATIVE = NF4Tensor(np.full(32, 0x70, np.uint8), np.float32([-(2.0**-127)]), shape=(1, 4, 16), dtype="bfloat16")
EIGHTS = np.full(16, 0x88, np.uint8)  # of 31 numbers; the library's loop without AVX-512 gave them a sign
SIGN = NF4Tensor(EIGHTS, np.float32([0.64042264]), shape=(1, 1, 31), dtype="float32", quant_type="fp4", blocksize=32)


@pytest.fixture(scope="module", params=["kernel", "kernel without vectors", "table"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ways to decode 4 bits: on this processor, as on one without AVX-512, and without the library."""
    operator = _decode_kernel.operator()
    if request.param != "kernel without vectors":
        yield request.param
        return
    if operator is None:
        pytest.skip("bitsandbytes is not installed")
    _decode_kernel.is_right.cache_clear()
    with mock.patch.object(_decode_kernel, "operator", return_value=without_vectors(operator)):
        yield request.param
    _decode_kernel.is_right.cache_clear()


@given(tensor=tensors(ranks=(3,), segments=True))
@example(ROWS)
@example(MANY)
@example(TAIL)
@example(SUBNORMAL)
@example(ONE_BYTE)
@example(CODE_8)
@example(NEGATIVE)
@example(SIGN)
def test_experts_are_decoded_to_the_last_bit(way: str, tensor: NF4Tensor) -> None:
    """Q1, Q2, Q3, Q5, Q6: one expert at a time, and several in any order, whose ids only the device knows."""
    right, given_ = decoded(tensor), in_torch(tensor)
    experts = torch.arange(tensor.shape[0]).flip(0)
    by_table = mock.patch.object(_decode, "decode_blocks", no_kernel if way == "table" else _decode.decode_blocks)
    with by_table, mock.patch.dict(_decode_table.PIECES, cpu=2048):  # so that a tensor takes several
        alone = torch.stack([_decode.decode_expert(given_, e) for e in range(tensor.shape[0])])
        several = _decode.decode_experts(given_, experts)
    assert alone.dtype == several.dtype == getattr(torch, tensor.dtype)
    assert equal_bits(alone.float().numpy(), right).all()
    assert equal_bits(several.float().numpy(), right[::-1]).all()


def no_kernel(*_: object) -> None:
    return None
