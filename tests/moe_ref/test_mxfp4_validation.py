"""Bad arguments of the functions for MXFP4: the type of the error, and its one line, word for word."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref import MoEConfig, MoEWeights, packed
from moe_ref.mxfp4 import decode, quantize
from moe_ref.types import MXFP4Tensor
from moe_ref.validation import check_mxfp4, check_quantize_mxfp4, check_weights

BLOCKS, SCALES = np.zeros((2, 3, 2, 16), np.uint8), np.full((2, 3, 2), 127, np.uint8)
GOOD = MXFP4Tensor(BLOCKS, SCALES, dtype="float32")
DTYPES = "must be one of 'float32', 'bfloat16', 'float16'"
SHAPE = "must be (..., k / 32, 16), 16 bytes to a block"


def test_good_ones_pass() -> None:
    check_mxfp4("t", GOOD)
    check_mxfp4("t", GOOD.transpose(1, 2))
    check_mxfp4("t", GOOD.map(torch.from_numpy))
    check_mxfp4("t", MXFP4Tensor(BLOCKS[0, 0], SCALES[0, 0]))


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"dtype": "float64"}, ValueError, f"t.dtype='float64': {DTYPES}"),
        ({"dtype": torch.float32}, ValueError, f"t.dtype=torch.float32: {DTYPES}"),
        ({"blocks": None}, TypeError, "t.blocks=None: must be an array"),
        ({"blocks": BLOCKS.astype(np.int8)}, TypeError, "t.blocks.dtype=int8: must be one of uint8"),
        ({"blocks": BLOCKS[0, 0, 0]}, ValueError, f"t.blocks.shape=(16,): {SHAPE}"),
        ({"blocks": BLOCKS[..., :8]}, ValueError, f"t.blocks.shape=(2, 3, 2, 8): {SHAPE}"),
        ({"blocks": BLOCKS.reshape(2, 3, 32)}, ValueError, f"t.blocks.shape=(2, 3, 32): {SHAPE}"),
        ({"scales": None}, TypeError, "t.scales=None: must be an array"),
        ({"scales": SCALES.astype(np.float32)}, TypeError, "t.scales.dtype=float32: must be one of uint8"),
        (
            {"scales": SCALES[1:]},
            ValueError,
            "t.scales.shape=(1, 3, 2): must be (2, 3, 2), one for each block of codes",
        ),
        (
            {"scales": SCALES.swapaxes(1, 2)},
            ValueError,
            "t.scales.shape=(2, 2, 3): must be (2, 3, 2), one for each block of codes",
        ),
        (
            {"scales": torch.from_numpy(SCALES)},
            TypeError,
            "t.scales is a torch array: must be a numpy array, as t.blocks",
        ),
        ({"transposed": 1}, TypeError, "t.transposed=1: must be True or False"),
        (
            {"transposed": True, "blocks": BLOCKS[0, 0], "scales": SCALES[0, 0]},
            ValueError,
            "t.transposed=True: must be False for a tensor of shape (64,)",
        ),
    ],
)
def test_tensors(changes: dict[str, Any], error: type, line: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(line)}$"):
        check_mxfp4("t", replace(GOOD, **changes))


def test_arrays_on_two_devices() -> None:
    tensor = GOOD.map(torch.from_numpy)
    line = "t.scales.device=meta: must be cpu, t.blocks's"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check_mxfp4("t", replace(tensor, scales=tensor.scales.to("meta")))


def test_no_tensor_in_4_bits() -> None:
    with pytest.raises(TypeError, match=r"^tensor=3: must be a moe_ref.MXFP4Tensor$"):
        decode(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^tensor=3: must be a moe_ref.NF4Tensor or a moe_ref.MXFP4Tensor$"):
        packed.decode(3)  # type: ignore[arg-type]


def test_one_dimension_does_not_swap() -> None:
    with pytest.raises(ValueError, match=r"^dimensions=\(0, 0\): must be the last two of 1$"):
        MXFP4Tensor(BLOCKS[0, 0], SCALES[0, 0]).transpose(0, 0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"gate_up_proj": replace(GOOD, scales=SCALES[1:])},
            "gate_up_proj.scales.shape=(1, 3, 2): must be (2, 3, 2), ",
        ),
        ({"down_proj": replace(GOOD, dtype="int8")}, "down_proj.dtype='int8': must be one of "),
        ({"gate_up_proj": GOOD}, "gate_up_proj.shape=(2, 3, 64): "),
        ({"down_proj": GOOD}, "down_proj.shape=(2, 3, 64): must be (2, 64, 32), "),
    ],
)
def test_layers(changes: dict[str, Any], line: str) -> None:
    gate_up = MXFP4Tensor(np.zeros((2, 64, 2, 16), np.uint8), np.zeros((2, 64, 2), np.uint8))
    down = MXFP4Tensor(np.zeros((2, 64, 1, 16), np.uint8), np.zeros((2, 64, 1), np.uint8))
    weights = MoEWeights(gate_up, down, config=MoEConfig(1))
    check_weights(weights)
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(line)}"):
        check_weights(replace(weights, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"values": [1.0]}, TypeError, "values=[1.0]: must be an array"),
        ({"values": np.ones(32)}, TypeError, "values.dtype=float64: must be one of float32, bfloat16, float16"),
        ({"dtype": "float64"}, ValueError, f"dtype='float64': {DTYPES}"),
        (
            {"values": np.ones((2, 48), np.float32)},
            ValueError,
            "values.shape=(2, 48): must be (..., k), k a multiple of 32",
        ),
        ({"values": np.float32(1)}, ValueError, "values.shape=(): must be (..., k), k a multiple of 32"),
    ],
)
def test_what_cannot_be_quantized(changes: dict[str, Any], error: type, line: str) -> None:
    arguments = {"values": np.ones(32, np.float32), "dtype": "float32"} | changes
    with pytest.raises(error, match=f"^{re.escape(line)}$"):
        quantize(arguments["values"], dtype=arguments["dtype"])
    with pytest.raises(error, match=f"^{re.escape(line)}$"):
        check_quantize_mxfp4(arguments["values"], arguments["dtype"])
