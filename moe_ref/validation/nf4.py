"""Checks NF4 and FP4. An error is one line: argument, value, what is allowed."""

from __future__ import annotations

from math import ceil
from typing import Any, get_args

from moe_ref._typing import Array
from moe_ref.moving import DECODED_DTYPES as DECODED_DTYPES
from moe_ref.types import NF4Tensor, QuantType
from moe_ref.validation.arrays import (
    check_array,
    check_bool,
    check_choice,
    check_devices,
    check_integer,
    check_shape,
    short,
)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_NESTED = 2**31 - 1
NESTED = ("nested_absmax", "nested_code", "nested_offset")


def check_nf4(name: str, tensor: Any) -> None:
    """Checks that the arrays of an `NF4Tensor` fit together (Q1, Q3, Q5); reads none of their elements.

    Args:
        name: of the argument.
        tensor: what must be an `NF4Tensor`.

    Raises:
        ValueError, TypeError: one line naming the field, its value, and what is allowed.
    """
    check_nf4_form(name, tensor)
    check_devices({f"{name}.{field}": array for field, array in tensor.arrays().items()})


def check_nf4_form(name: str, tensor: Any) -> None:
    """`check_nf4` but for devices."""
    if not isinstance(tensor, NF4Tensor):
        raise TypeError(f"{name}={short(tensor)}: must be a moe_ref.NF4Tensor")
    _check_format(f"{name}.", tensor.dtype, tensor.quant_type, tensor.blocksize)
    shape = tensor.shape
    if not isinstance(shape, tuple) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise TypeError(f"{name}.shape={short(shape)}: must be a tuple of integers, each at least 0")
    check_bool(f"{name}.transposed", tensor.transposed)
    if tensor.transposed and len(shape) < 2:
        raise ValueError(f"{name}.transposed=True: must be False for a tensor of shape {shape}")
    size, packed = tensor.size, (f"{name}.packed", tensor.packed)
    blocks = ceil(size / tensor.blocksize)
    check_array(*packed, dtypes=("uint8",))
    check_shape(*packed, (ceil(size / 2),), "two codes to a byte")
    check_integer(f"{name}.nested_blocksize", tensor.nested_blocksize)
    if not 1 <= tensor.nested_blocksize <= LARGEST_NESTED:
        allowed = f"must be at least 1, and at most {LARGEST_NESTED}"
        raise ValueError(f"{name}.nested_blocksize={short(tensor.nested_blocksize)}: {allowed}")
    missing = [n for n in NESTED if getattr(tensor, n) is None]
    nested = len(missing) < len(NESTED)
    if nested and missing:
        raise ValueError(f"{name}.{missing[0]}=None: must be given with the other nested statistics")
    check_array(f"{name}.absmax", tensor.absmax, like=packed, dtypes=("uint8",) if nested else ("float32",))
    check_shape(f"{name}.absmax", tensor.absmax, (blocks,), "one for each block of codes")
    if nested:
        _check_nested(name, tensor, blocks)


def _check_nested(name: str, tensor: NF4Tensor, blocks: int) -> None:
    for field in NESTED:
        value: Array = getattr(tensor, field)
        check_array(f"{name}.{field}", value, like=(f"{name}.packed", tensor.packed), dtypes=("float32",))
    check_shape(f"{name}.nested_code", tensor.nested_code, (256,), "one for each code of a byte")
    offset: Array = tensor.nested_offset
    shape = tuple(offset.shape)
    if shape and (not tensor.shape or len(shape) != 1 or shape[0] != tensor.shape[0]):
        allowed = f"must be (), or {tuple(tensor.shape[:1])}, one per expert"
        raise ValueError(f"{name}.nested_offset.shape={shape}: {allowed}")
    segments = tensor.segments
    if shape and segments and tensor.size // segments % tensor.blocksize:
        own = tensor.size // segments
        allowed = f"must be (), since the {own} numbers of an expert are not a multiple of {tensor.blocksize}"
        raise ValueError(f"{name}.nested_offset.shape={shape}: {allowed} (blocksize)")
    per_segment = ceil(blocks / segments / tensor.nested_blocksize) if segments else 0
    meaning = "one for each nested block of each segment"
    check_shape(f"{name}.nested_absmax", tensor.nested_absmax, (segments * per_segment,), meaning)


def check_quantize(values: Any, dtype: Any, quant_type: Any, blocksize: Any, nested: Any, name: str = "values") -> None:
    """Checks the arguments of ``quantize``. The caller promises that the values are finite.

    ``name`` is the name of ``values`` in messages.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_array(name, values, dtypes=DECODED_DTYPES)
    _check_format("", dtype, quant_type, blocksize)
    check_bool("nested", nested)


def _check_format(prefix: str, dtype: Any, quant_type: Any, blocksize: Any) -> None:
    check_choice(f"{prefix}dtype", dtype, DECODED_DTYPES)
    check_choice(f"{prefix}quant_type", quant_type, get_args(QuantType))
    check_integer(f"{prefix}blocksize", blocksize)
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{prefix}blocksize={blocksize}: must be one of {', '.join(map(str, BLOCKSIZES))}")
