"""Faults that no gate measures: changed inputs, wrong forms, missing gradients, runs that differ.

The suite, ``compare`` and ``bench`` share these checks; each reports in its own words what it ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moe_ref.conformance.judgement.call import Inputs, Result
from moe_ref.conformance.judgement.gates import Verdict
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from torch import Tensor


# What an executor may raise without ending the judgement of the others.
RAISED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError),
)


class Fault(NamedTuple):
    """A broken clause, with a one-line message; ``tensor`` is "y" or whose gradient it is about, or ""."""

    clause: str
    message: str
    tensor: str = ""

    def __str__(self) -> str:
        """The clause and the message."""
        return f"{self.clause}: {self.message}"


@dataclass(frozen=True, eq=False)
class Judgement:
    """What came of one executor on one input.

    Attributes:
        verdicts: of y and of each gradient.
        fault: what no gate measures, such as an exception or a wrong shape, in one line; or "".
        reason: why it does not take this input; or "".
        z: by tensor, the errors in error bars of all elements that can err.
    """

    verdicts: tuple[Verdict, ...] = ()
    fault: str = ""
    reason: str = ""
    z: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """One verdict for each tensor that fails, the worst first; y, which inference needs, before all gradients."""
        failed = sorted((v for v in self.verdicts if v.failure), key=lambda v: v.severity)
        return tuple(sorted({v.name: v for v in failed}.values(), key=lambda v: v.severity, reverse=True))

    @property
    def failure(self) -> str:
        """What is wrong, in a line that begins with the clauses of which one is broken: the worst tensor; or ""."""
        return self.fault or next((says(v) for v in self.broken), "")

    @property
    def max_z(self) -> float | None:
        """The largest error in error bars."""
        return max((v.max_z for v in self.verdicts), default=None)


def says(verdict: Verdict) -> str:
    """A failed verdict in a line: the clauses of which one is broken, the tensor, which may be a gradient, and how."""
    gradient = {"y": "", "x": "d"}.get(verdict.name, "d ")
    return f"{verdict.clauses}: {gradient}{verdict.failure}"


def raised(error: BaseException) -> Judgement:
    """The judgement of an executor that raised."""
    return Judgement(fault="raised " + " ".join(f"{type(error).__name__}: {error}".split()))


def copies(inputs: Inputs) -> dict[str, Tensor]:
    """Copies of all arguments of an executor, by name."""
    tensors = inputs.tensors() | inputs.codes() | {"dy": inputs.dy, "topk_ids": inputs.topk_ids}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(inputs: Inputs, before: dict[str, Tensor]) -> Fault | None:
    """E4: an executor leaves every bit of its inputs unchanged."""
    for name, value in copies(inputs).items():
        if not same_bits(value, before[name]):
            return Fault("E4", f"{name} was changed in place", name)
    return None


def wrong_form(result: Result, inputs: Inputs, backward: bool) -> Fault | None:
    """The first of `wrong_forms`."""
    return next(wrong_forms(result, inputs, backward), None)


def wrong_forms(result: Result, inputs: Inputs, backward: bool) -> Iterator[Fault]:
    """E3, T2, D1: shape, dtypes, and gradients exactly for the inputs that need them."""
    if result.shape != inputs.x.shape:
        yield Fault("E3", f"y.shape={tuple(result.shape)}, but must be {tuple(inputs.x.shape)}, x's", "y")
    owners = inputs.tensors() | {"y": inputs.x}
    for name, value in result.tensors.items():
        if value.dtype != owners[name].dtype:
            what = "y" if name == "y" else f"the gradient of {name}"
            yield Fault("T2", f"{what} is {dtype_name(value)}, but must be {dtype_name(owners[name])}", name)
    if backward and result.missing:
        yield Fault("D1", f"no gradient for {', '.join(result.missing)}", result.missing[0])
    if result.unasked:
        yield Fault("D1", f"a gradient for frozen {', '.join(result.unasked)}", result.unasked[0])


def different(first: Result, second: Result, between: str) -> Fault | None:
    """C1: two runs give the same bits."""
    for name, value in first.tensors.items():
        if not same_bits(value, second.tensors[name]):
            return Fault("C1", f"{name} differs between {between}", name)
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, also NaN."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
