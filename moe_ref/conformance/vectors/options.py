"""What a case says beside its numbers, as arrays: the configuration, how to call, and the form of 4 bits.

A C program has no JSON. So choices are numbers (their place in `CHOICES`), and None is -1 or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import numpy as np

from moe_ref import types
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.layout import BadVectors, Stored, stored, stored_text
from moe_ref.types import MoEConfig, MXFP4Tensor, NF4Tensor, PackedTensor
from moe_ref.validation import check_config
from moe_ref.validation.mxfp4 import check_mxfp4
from moe_ref.validation.nf4 import check_nf4

CHOICES: dict[str, tuple[str, ...]] = {
    "scoring": get_args(types.Scoring),
    "renormalize_form": get_args(types.RenormalizeForm),
    "group_score": get_args(types.GroupScore),
    "selection_key": get_args(types.SelectionKey),
    "activation": get_args(types.Activation),
    "clamp": get_args(types.Clamp),
    "gate_up_layout": get_args(types.GateUpLayout),
}
FLAGS = ("renormalize", "scale_input")
WHOLE = ("top_k", "num_groups", "topk_groups")
NONE_AS_NAN = ("limit", "gate_softcap", "up_softcap")
LAYOUTS = ("x_layout", "weights_layout", "dy_layout", "routing_layout")
LAYOUT_NAMES = ("contiguous", "transposed", "sliced", "expanded", "scalar")


def config_arrays(config: MoEConfig) -> dict[str, Stored]:
    """The configuration: an array of rank 0 for each field."""
    return {f"config.{f.name}": _scalar(f.name, getattr(config, f.name)) for f in fields(MoEConfig)}


def _scalar(name: str, value: Any) -> Stored:
    if name in CHOICES:
        return stored(CHOICES[name].index(value), "int64")
    if name in (*FLAGS, *WHOLE):
        return stored(-1 if value is None else int(value), "int64")
    return stored(math.nan if value is None else value, "float64")


def config_of(file: str, arrays: Mapping[str, Stored], checked: bool = True) -> MoEConfig:
    """The configuration that a file holds.

    Args:
        file: its name, for messages.
        arrays: its arrays.
        checked: False where a configuration is wrong on purpose.

    Raises:
        BadVectors: a field is missing or not allowed.
    """
    found: dict[str, Any] = {}
    for field in fields(MoEConfig):
        name = f"config.{field.name}"
        whole = field.name in (*CHOICES, *FLAGS, *WHOLE)
        value = scalar(file, arrays, name, "int64" if whole else "float64")
        if field.name in CHOICES:
            choices = CHOICES[field.name]
            if not 0 <= value < len(choices):
                raise BadVectors(f"{file}: {name}={value}: must be at least 0 and at most {len(choices) - 1}")
            value = choices[int(value)]
        elif field.name in FLAGS:
            if value not in (0, 1):
                raise BadVectors(f"{file}: {name}={value}: must be 0 or 1")
            value = bool(value)
        elif (field.name == "top_k" and value == -1) or (field.name in NONE_AS_NAN and math.isnan(value)):
            value = None
        found[field.name] = value
    config = MoEConfig(**found)
    if checked:
        try:
            check_config(config)
        except (ValueError, TypeError) as error:
            raise BadVectors(f"{file}: config.{error}") from error
    return config


def call_arrays(problem: Problem) -> dict[str, Stored]:
    """How executors of torch get the numbers: strides, leading dimensions, what is frozen. Defaults are left out."""
    found = {
        f"call.{name}": stored_text(getattr(problem, name))
        for name in LAYOUTS
        if getattr(problem, name) != "contiguous"
    }
    if problem.batch:
        found["call.batch"] = stored(1, "int64")
    if not problem.top_k_given:
        found["call.top_k_given"] = stored(0, "int64")
    if problem.frozen:
        found["call.frozen"] = stored_text(" ".join(sorted(problem.frozen)))
    return found


def call_of(file: str, arrays: Mapping[str, Stored]) -> dict[str, Any]:
    """Fields of `Problem` that a file gives.

    Raises:
        BadVectors: one is not allowed.
    """
    found: dict[str, Any] = {}
    for name in LAYOUTS:
        if f"call.{name}" in arrays:
            found[name] = text(file, arrays, f"call.{name}")
            if found[name] not in LAYOUT_NAMES:
                raise BadVectors(f"{file}: call.{name}={found[name]!r:.60}: must be one of {', '.join(LAYOUT_NAMES)}")
    if "call.frozen" in arrays:
        found["frozen"] = frozenset(text(file, arrays, "call.frozen").split())
    for name in ("batch", "top_k_given"):
        if f"call.{name}" in arrays:
            found[name] = bool(scalar(file, arrays, f"call.{name}", "int64"))
    return found


def packed_arrays(prefix: str, tensor: PackedTensor) -> dict[str, Stored]:
    """A tensor in 4 bits: its bytes and scales as they are, and its form."""
    dtypes = {"packed": "uint8", "blocks": "uint8", "scales": "uint8"}
    found = {
        f"{prefix}.{name}": stored(array, dtypes.get(name, str(array.dtype))) for name, array in tensor.arrays().items()
    }
    found[f"{prefix}.quant_type"] = stored_text(tensor.quant_type)
    found[f"{prefix}.dtype"] = stored_text(tensor.dtype)
    found[f"{prefix}.shape"] = stored(np.array(tensor.shape, dtype=np.int64), "int64")
    found[f"{prefix}.transposed"] = stored(int(tensor.transposed), "int64")
    if isinstance(tensor, NF4Tensor):
        found[f"{prefix}.blocksize"] = stored(tensor.blocksize, "int64")
        found[f"{prefix}.nested_blocksize"] = stored(tensor.nested_blocksize, "int64")
    return found


def packed_of(file: str, arrays: Mapping[str, Stored], prefix: str) -> PackedTensor:
    """The tensor in 4 bits that a file holds.

    Raises:
        BadVectors: its parts do not fit together.
    """
    form = text(file, arrays, f"{prefix}.quant_type")
    kind: type[MXFP4Tensor] | type[NF4Tensor] = MXFP4Tensor if form == "mxfp4" else NF4Tensor
    parts: dict[str, Any] = {
        name: arrays[f"{prefix}.{name}"].array for name in kind.NAMES if f"{prefix}.{name}" in arrays
    }
    options: dict[str, Any] = {
        "dtype": text(file, arrays, f"{prefix}.dtype"),
        "transposed": bool(scalar(file, arrays, f"{prefix}.transposed", "int64")),
    }
    if kind is NF4Tensor:
        options |= {
            name: int(scalar(file, arrays, f"{prefix}.{name}", "int64")) for name in ("blocksize", "nested_blocksize")
        }
        options |= {"quant_type": form, "shape": tuple(map(int, given(file, arrays, f"{prefix}.shape").array))}
    try:
        tensor = kind(**parts, **options)
        check_mxfp4(prefix, tensor) if kind is MXFP4Tensor else check_nf4(prefix, tensor)
    except (ValueError, TypeError) as error:
        raise BadVectors(f"{file}: {error}") from error
    return tensor


def given(file: str, arrays: Mapping[str, Stored], name: str) -> Stored:
    """An array that must be there.

    Raises:
        BadVectors: it is not.
    """
    if name not in arrays:
        raise BadVectors(f"{file}: array {name} is missing: must be there")
    return arrays[name]


def scalar(file: str, arrays: Mapping[str, Stored], name: str, dtype: str) -> Any:
    """A number of rank 0.

    Raises:
        BadVectors: it is missing, or has another form.
    """
    value = given(file, arrays, name)
    if value.shape or value.dtype != dtype:
        raise BadVectors(f"{file}: {name} is {value.dtype} of shape {value.shape}: must be {dtype} of shape ()")
    return value.array.item()


def text(file: str, arrays: Mapping[str, Stored], name: str) -> str:
    """A text in ASCII.

    Raises:
        BadVectors: it is missing, or no text.
    """
    value = given(file, arrays, name)
    raw = value.array.tobytes()
    if value.dtype != "uint8" or len(value.shape) != 1 or not raw.isascii() or not raw.decode("ascii").isprintable():
        raise BadVectors(f"{file}: {name}={raw[:40]!r}: must be a text in ASCII")
    return raw.decode("ascii")
