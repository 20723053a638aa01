"""Checks shared by `executors.nf4` and `executors.mxfp4`: what they quantise, and the dtype it decodes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ref.types import PackedTensor
from moe_ref.validation import dtype_name


def check_dense(name: str, values: Any) -> None:
    """Checks that a value is a torch tensor and not in 4 bits.

    Raises:
        TypeError: one line naming the argument, what it is, and what it must be.
    """
    if isinstance(values, PackedTensor):
        kind = type(values).__name__
        raise TypeError(f"{name} is an {kind}: must be a dense tensor, since nothing is quantised twice")
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__module__}.{type(values).__name__}: must be a torch.Tensor")


def decoded_dtype(values: Tensor, dtype: torch.dtype | str | None) -> str:
    """The name of ``dtype``; for None, that of the values' dtype."""
    return dtype_name(values) if dtype is None else name_of(dtype)


def name_of(dtype: torch.dtype | str) -> str:
    """The dtype's name: "bfloat16" for torch.bfloat16. Anything but a torch.dtype is returned unchanged."""
    return str(dtype).rpartition(".")[2] if isinstance(dtype, torch.dtype) else dtype
