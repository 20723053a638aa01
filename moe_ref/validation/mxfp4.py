"""Checks MXFP4. An error is one line: argument, value, what is allowed."""

from __future__ import annotations

from typing import Any

from moe_ref.types import MXFP4Tensor
from moe_ref.validation.arrays import check_array, check_bool, check_choice, check_devices, check_shape, short
from moe_ref.validation.nf4 import DECODED_DTYPES

BYTES = 16  # of a block of 32 codes


def check_mxfp4(name: str, tensor: Any) -> None:
    """Checks that the arrays of an `MXFP4Tensor` fit together (M1); reads none of their elements.

    Args:
        name: of the argument.
        tensor: what must be an `MXFP4Tensor`.

    Raises:
        ValueError, TypeError: one line naming the field, its value, and what is allowed.
    """
    check_mxfp4_form(name, tensor)
    check_devices({f"{name}.{field}": array for field, array in tensor.arrays().items()})


def check_mxfp4_form(name: str, tensor: Any) -> None:
    """`check_mxfp4` but for devices."""
    if not isinstance(tensor, MXFP4Tensor):
        raise TypeError(f"{name}={short(tensor)}: must be a moe_ref.MXFP4Tensor")
    check_choice(f"{name}.dtype", tensor.dtype, DECODED_DTYPES)
    blocks = (f"{name}.blocks", tensor.blocks)
    check_array(*blocks, dtypes=("uint8",))
    shape = tuple(tensor.blocks.shape)
    if len(shape) < 2 or shape[-1] != BYTES:
        raise ValueError(f"{name}.blocks.shape={shape}: must be (..., k / 32, {BYTES}), {BYTES} bytes to a block")
    check_array(f"{name}.scales", tensor.scales, like=blocks, dtypes=("uint8",))
    check_shape(f"{name}.scales", tensor.scales, shape[:-1], "one for each block of codes")
    check_bool(f"{name}.transposed", tensor.transposed)
    if tensor.transposed and len(shape) < 3:
        raise ValueError(f"{name}.transposed=True: must be False for a tensor of shape ({2 * BYTES * shape[0]},)")


def check_quantize_mxfp4(values: Any, dtype: Any, name: str = "values") -> None:
    """Checks the arguments of ``quantize``. The caller promises that the values are finite.

    Args:
        values: the array to quantise.
        dtype: the dtype to decode to.
        name: the name of ``values`` in messages.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_array(name, values, dtypes=DECODED_DTYPES)
    check_choice("dtype", dtype, DECODED_DTYPES)
    shape = tuple(values.shape)
    if not shape or shape[-1] % (2 * BYTES):
        raise ValueError(f"{name}.shape={shape}: must be (..., k), k a multiple of {2 * BYTES}")
