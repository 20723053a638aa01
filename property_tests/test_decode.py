"""The executors' own decoding gives the specification's bits, by the library's kernel and by the table (Q1 to Q6)."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given

from executors import _decode, _decode_table
from moe_ref.nf4 import dynamic_code
from moe_ref.types import NF4Tensor
from random_nf4 import decoded, equal_bits, in_torch, tensors


def many_blocks() -> NF4Tensor:
    """Three experts of 300 nested scales each, under one offset: the second begins within a nested block."""
    rng = np.random.default_rng(0)
    static = {"shape": (3, 300, 32), "dtype": "bfloat16", "blocksize": 32}
    scales = rng.integers(0, 256, 900, dtype=np.uint8), np.float32([1, 2, 3, 4])
    nested = *scales, np.array(dynamic_code(), dtype=np.float32), np.array(0.5, dtype=np.float32)
    return NF4Tensor(rng.integers(0, 256, 3 * 4800, dtype=np.uint8), *nested, **static)


def partial_last_block() -> NF4Tensor:
    """More codes than are decoded at a time, and a last block of its own scale, which ends early."""
    codes = np.random.default_rng(1).integers(0, 256, 4511, dtype=np.uint8)
    return NF4Tensor(codes, np.arange(1, 142, dtype=np.float32), shape=(1, 1, 9021), dtype="float32")


MANY, TAIL = many_blocks(), partial_last_block()
FF = 0xFF  # twice the code of 1
ROWS = NF4Tensor(np.full(48, FF, np.uint8), np.float32([1, 2]), shape=(2, 3, 16), dtype="float32", blocksize=64)
SUBNORMAL = NF4Tensor(np.full(32, FF, np.uint8), np.float32([2.0**-127]), shape=(1, 4, 16), dtype="bfloat16")
ONE_BYTE = NF4Tensor(np.uint8([0x7F]), np.float32([1]), shape=(1, 1, 2), dtype="float32")
CODE_8 = NF4Tensor(np.uint8([0x80, 0]), np.float32([1]), shape=(1, 2, 2), dtype="float32", quant_type="fp4")
NEGATIVE = NF4Tensor(np.full(32, 0x70, np.uint8), np.float32([-(2.0**-127)]), shape=(1, 4, 16), dtype="bfloat16")


@pytest.mark.parametrize("way", ["kernel", "table"])
@given(tensor=tensors(ranks=(3,), segments=True))
@example(ROWS)
@example(MANY)
@example(TAIL)
@example(SUBNORMAL)
@example(ONE_BYTE)
@example(CODE_8)
@example(NEGATIVE)
def test_experts_are_decoded_to_the_last_bit(way: str, tensor: NF4Tensor) -> None:
    """Q1, Q2, Q3, Q5, Q6: one expert at a time, and several whose numbers only the device knows, in any order."""
    right, given_ = decoded(tensor), in_torch(tensor)
    experts = torch.arange(tensor.shape[0]).flip(0)
    by_table = mock.patch.object(_decode, "decode_blocks", _decode.decode_blocks if way == "kernel" else no_kernel)
    with by_table, mock.patch.dict(_decode_table.PIECES, cpu=2048):  # so that a tensor takes several
        alone = torch.stack([_decode.decode_expert(given_, e) for e in range(tensor.shape[0])])
        several = _decode.decode_experts(given_, experts)
    assert alone.dtype == several.dtype == getattr(torch, tensor.dtype)
    assert equal_bits(alone.float().numpy(), right).all()
    assert equal_bits(several.float().numpy(), right[::-1]).all()


def no_kernel(*_: object) -> None:
    return None
