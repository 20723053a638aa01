"""Faults that no gate measures: changed inputs, wrong forms, missing gradients, runs that differ.

The suite, ``compare`` and ``bench`` share these checks; each reports in its own words what it ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_ref.conformance.judgement.call import Inputs, Result
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from torch import Tensor


class Fault(NamedTuple):
    """A broken clause, with a one-line message."""

    clause: str
    message: str

    def __str__(self) -> str:
        """The clause and the message."""
        return f"{self.clause}: {self.message}"


def copies(inputs: Inputs) -> dict[str, Tensor]:
    """Copies of all arguments of an executor, by name."""
    tensors = inputs.tensors() | inputs.codes() | {"dy": inputs.dy, "topk_ids": inputs.topk_ids}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(inputs: Inputs, before: dict[str, Tensor]) -> Fault | None:
    """E4: an executor leaves every bit of its inputs unchanged."""
    for name, value in copies(inputs).items():
        if not same_bits(value, before[name]):
            return Fault("E4", f"{name} was changed in place")
    return None


def wrong_form(result: Result, inputs: Inputs, backward: bool) -> Fault | None:
    """E3, T2, D1: shape, dtypes, and gradients exactly for the inputs that need them."""
    if result.shape != inputs.x.shape:
        return Fault("E3", f"y.shape={tuple(result.shape)}, but must be {tuple(inputs.x.shape)}, x's")
    owners = inputs.tensors() | {"y": inputs.x}
    for name, value in result.tensors.items():
        if value.dtype != owners[name].dtype:
            what = "y" if name == "y" else f"the gradient of {name}"
            return Fault("T2", f"{what} is {dtype_name(value)}, but must be {dtype_name(owners[name])}")
    if backward and result.missing:
        return Fault("D1", f"no gradient for {', '.join(result.missing)}")
    if result.unasked:
        return Fault("D1", f"a gradient for frozen {', '.join(result.unasked)}")
    return None


def different(first: Result, second: Result, between: str) -> Fault | None:
    """C1: two runs give the same bits."""
    for name, value in first.tensors.items():
        if not same_bits(value, second.tensors[name]):
            return Fault("C1", f"{name} differs between {between}")
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, also NaN."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
