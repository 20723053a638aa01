"""Tensors in MXFP4 for its tests."""

from __future__ import annotations

import numpy as np
import torch

from moe_ref.types import MXFP4Tensor

DTYPES = ("float32", "bfloat16", "float16")
EVERY_BYTE = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)


def u8(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint8)


def block(*codes: int, scale: int = 127, dtype: str = "float32") -> MXFP4Tensor:
    """[32] One block that begins with these codes; the others are 0."""
    codes = (*codes, *[0] * (32 - len(codes)))
    packed = [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)]
    return MXFP4Tensor(u8(*packed)[None], u8(scale), dtype=dtype)


def every_byte(dtype: str = "float32") -> MXFP4Tensor:
    """[1, 256, 512] Row e has exponent e and all bytes."""
    scales = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(16, axis=2)
    return MXFP4Tensor(EVERY_BYTE.repeat(256, axis=1), scales, dtype=dtype)


def random_mxfp4(
    *shape: int, dtype: str = "float32", seed: int = 0, exponents: tuple[int, int] = (0, 256)
) -> MXFP4Tensor:
    """Any bytes with any exponents."""
    rng = np.random.default_rng(seed)
    *rows, width = shape
    blocks = rng.integers(0, 256, (*rows, width // 32, 16), dtype=np.uint8)
    return MXFP4Tensor(blocks, rng.integers(*exponents, blocks.shape[:-1], dtype=np.uint8), dtype=dtype)


def in_torch(tensor: MXFP4Tensor) -> MXFP4Tensor:
    return tensor.map(torch.from_numpy)


def same_arrays(found: MXFP4Tensor, expected: MXFP4Tensor) -> None:
    """Every byte, and everything static."""
    assert (found.shape, found.dtype, found.transposed) == (expected.shape, expected.dtype, expected.transposed)
    for name, value in found.arrays().items():
        other = expected.arrays()[name]
        assert np.array_equal(np.asarray(value), np.asarray(other)), name
