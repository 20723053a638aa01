"""Bad arguments of the functions for NF4 and FP4: the type of the error, and its one line, word for word."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref.nf4 import absmax_of, decode, quantize
from moe_ref.types import NF4Tensor
from moe_ref.validation import check_nf4, check_quantize

BYTES, SCALES = np.zeros(96, dtype=np.uint8), np.ones(6, dtype=np.float32)
GOOD = NF4Tensor(BYTES, SCALES, shape=(2, 1, 96), dtype="float32", blocksize=32)
NESTED = replace(
    GOOD,
    absmax=np.zeros(6, dtype=np.uint8),
    nested_absmax=np.ones(4, dtype=np.float32),
    nested_code=np.zeros(256, dtype=np.float32),
    nested_offset=np.zeros(2, dtype=np.float32),
    nested_blocksize=2,
)
DTYPES = "must be one of 'float32', 'bfloat16', 'float16'"
SIZES = "must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096"
TUPLE = "must be a tuple of integers, each at least 0"
NOT_32 = {"shape": (2, 1, 48), "packed": BYTES[:48], "absmax": NESTED.absmax[:3]}


def test_good_ones_pass() -> None:
    check_nf4("t", GOOD)
    check_nf4("t", NESTED)
    check_nf4("t", replace(NESTED, nested_offset=np.float32(0), nested_absmax=np.ones(3, dtype=np.float32)))
    check_nf4("t", replace(GOOD, transposed=True))


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"dtype": "float64"}, ValueError, f"t.dtype='float64': {DTYPES}"),
        ({"dtype": torch.float32}, ValueError, f"t.dtype=torch.float32: {DTYPES}"),
        ({"quant_type": "int4"}, ValueError, "t.quant_type='int4': must be one of 'nf4', 'fp4'"),
        ({"blocksize": 48}, ValueError, f"t.blocksize=48: {SIZES}"),
        ({"blocksize": 64.0}, TypeError, "t.blocksize=64.0: must be an integer"),
        ({"shape": [2, 1, 96]}, TypeError, f"t.shape=[2, 1, 96]: {TUPLE}"),
        ({"shape": (2, -1)}, TypeError, f"t.shape=(2, -1): {TUPLE}"),
        ({"shape": (True, 96)}, TypeError, f"t.shape=(True, 96): {TUPLE}"),
        ({"shape": (2.0, 96)}, TypeError, f"t.shape=(2.0, 96): {TUPLE}"),
        ({"transposed": 1}, TypeError, "t.transposed=1: must be True or False"),
        (
            {"transposed": True, "shape": (192,)},
            ValueError,
            "t.transposed=True: must be False for a tensor of shape (192,)",
        ),
        ({"packed": None}, TypeError, "t.packed=None: must be an array"),
        ({"packed": BYTES.astype(np.int8)}, TypeError, "t.packed.dtype=int8: must be one of uint8"),
        ({"packed": BYTES[1:]}, ValueError, "t.packed.shape=(95,): must be (96,), two codes to a byte"),
        ({"packed": BYTES[:, None]}, ValueError, "t.packed.shape=(96, 1): must be (96,), two codes to a byte"),
        ({"absmax": None}, TypeError, "t.absmax=None: must be an array"),
        ({"absmax": SCALES.astype(np.float16)}, TypeError, "t.absmax.dtype=float16: must be one of float32"),
        ({"absmax": SCALES[1:]}, ValueError, "t.absmax.shape=(5,): must be (6,), one for each block of codes"),
        (
            {"absmax": torch.ones(6)},
            TypeError,
            "t.absmax is a torch array: must be a numpy array, as t.packed",
        ),
        (
            {"nested_absmax": SCALES},
            ValueError,
            "t.nested_code=None: must be given with the other nested statistics",
        ),
    ],
)
def test_plain_tensors(changes: dict[str, Any], error: type, line: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(line)}$"):
        check_nf4("t", replace(GOOD, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"absmax": SCALES}, TypeError, "t.absmax.dtype=float32: must be one of uint8"),
        ({"nested_offset": None}, ValueError, "t.nested_offset=None: must be given with the other nested statistics"),
        ({"nested_blocksize": 0}, ValueError, "t.nested_blocksize=0: must be at least 1, and at most 2147483647"),
        ({"nested_blocksize": True}, TypeError, "t.nested_blocksize=True: must be an integer"),
        (
            {"nested_code": np.zeros(256)},
            TypeError,
            "t.nested_code.dtype=float64: must be one of float32",
        ),
        (
            {"nested_code": SCALES},
            ValueError,
            "t.nested_code.shape=(6,): must be (256,), one for each code of a byte",
        ),
        (
            {"nested_absmax": SCALES[:3]},
            ValueError,
            "t.nested_absmax.shape=(3,): must be (4,), one for each nested block of each segment",
        ),
        (
            {"nested_offset": SCALES[:3]},
            ValueError,
            "t.nested_offset.shape=(3,): must be (), or (2,), one per expert",
        ),
        (
            NOT_32,
            ValueError,
            "t.nested_offset.shape=(2,): must be (), since the 48 numbers of an expert are not a multiple of 32 "
            "(blocksize)",
        ),
        (
            {"nested_absmax": torch.ones(4)},
            TypeError,
            "t.nested_absmax is a torch array: must be a numpy array, as t.packed",
        ),
    ],
)
def test_nested_tensors(changes: dict[str, Any], error: type, line: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(line)}$"):
        check_nf4("t", replace(NESTED, **changes))


def test_arrays_on_two_devices() -> None:
    tensor = GOOD.map(torch.from_numpy)
    line = "t.absmax.device=meta: must be cpu, t.packed's"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check_nf4("t", replace(tensor, absmax=tensor.absmax.to("meta")))


@pytest.mark.parametrize("function", [decode, absmax_of])
def test_no_tensor_in_4_bits(function: Any) -> None:
    with pytest.raises(TypeError, match=r"^tensor=3: must be a moe_ref.NF4Tensor$"):
        function(3)


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"values": [1.0]}, TypeError, "values=[1.0]: must be an array"),
        (
            {"values": np.ones(2)},
            TypeError,
            "values.dtype=float64: must be one of float32, bfloat16, float16",
        ),
        ({"dtype": "float64"}, ValueError, f"dtype='float64': {DTYPES}"),
        ({"quant_type": None}, ValueError, "quant_type=None: must be one of 'nf4', 'fp4'"),
        ({"blocksize": 16}, ValueError, f"blocksize=16: {SIZES}"),
        ({"blocksize": True}, TypeError, "blocksize=True: must be an integer"),
        ({"nested": "yes"}, TypeError, "nested='yes': must be True or False"),
    ],
)
def test_what_cannot_be_quantized(changes: dict[str, Any], error: type, line: str) -> None:
    good = {"values": SCALES, "dtype": "float32", "quant_type": "nf4", "blocksize": 64, "nested": False}
    for function in (quantize, check_quantize):
        given = {**good, **changes}
        with pytest.raises(error, match=f"^{re.escape(line)}$"):
            function(given.pop("values"), **given)
