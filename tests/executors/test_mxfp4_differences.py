"""Where transformers' conversion of MXFP4 differs from the specification (M1): docs/known-differences.md.

A test asserts the specification's answer against arithmetic done by hand. What the library answers depends on the
versions of transformers and torch: where it agrees, the test says so by skipping.
"""

from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref.mxfp4 import decode
from moe_ref.types import MXFP4Tensor
from random_mxfp4 import DTYPES, every_byte, in_torch, random_mxfp4
from random_nf4 import equal_bits


def converted(tensor: MXFP4Tensor) -> np.ndarray:
    """By transformers, in the order in which gpt-oss ships it: the library transposes its answer."""
    library = pytest.importorskip("transformers.integrations.mxfp4")
    given = in_torch(tensor)
    found = library.convert_moe_packed_tensors(given.blocks, given.scales, dtype=getattr(torch, tensor.dtype))
    return found.transpose(1, 2).float().contiguous().numpy()


def demand(library: Any, right: Any, wrong: Any) -> None:
    """That the library says ``wrong``; skips, and tells, where it is right."""
    if repr(library) == repr(right):
        pytest.skip(f"transformers {version('transformers')} with torch {torch.__version__} is right")
    assert repr(library) == repr(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bytes_and_exponents_but_255(dtype: str) -> None:
    """M1: equal to the last bit, overflows, subnormal numbers and signs of zeros included."""
    t = every_byte(dtype)
    assert equal_bits(converted(t)[:, :255], decode(t)[:, :255]).all()


def test_the_order_of_experts_rows_and_blocks() -> None:
    """M1: the library's answer is (E, H, 2I), as gpt-oss has its parameter in bf16."""
    t = random_mxfp4(3, 5, 96, dtype="bfloat16", exponents=(110, 140))
    assert equal_bits(converted(t), decode(t)).all()


def test_exponent_255() -> None:
    """M1: 255 is NaN, whatever the code; the library reads it as 2**128, under which 0 and 0.5 are finite."""
    t = MXFP4Tensor(np.array([[[[0x10, *[0x22] * 15]]]], np.uint8), np.full((1, 1, 1), 255, np.uint8), dtype="bfloat16")
    right, wrong = [float("nan")] * 3, [0.0, 0.5 * 2.0**128, float("inf")]
    assert repr(decode(t)[0, 0, :3].tolist()) == repr(right)
    demand(converted(t)[0, 0, :3].tolist(), right, wrong)
