"""What is wrong with a kernel, in one line each, with the line of its source."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.text import Instruction

MOST = 12  # lines of a report
NAN_ABOVE = {2: (0x7F80, 0x7C00), 4: (0x7F800000,), 8: (0x7FF0000000000000,)}  # infinity, by the bytes of a number


class KernelFault(AssertionError):
    """A compiled kernel did what no kernel may do; the message has a line for each instruction that did."""


class Faults:
    """Collects faults of one launch, the first of each kind at each instruction.

    Args:
        kernel: its name.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.found: dict[tuple[str, int], str] = {}

    def add(self, own: Instruction, what: str, threads: Any, where: str = "") -> None:
        """Notes a fault.

        Args:
            own: the instruction.
            what: the kind of fault.
            threads: as (program, thread) of one that did it.
            where: details.
        """
        key = (what, own.line)
        if key not in self.found:
            program, thread = threads
            source = own.source or "no line of source"
            detail = f" ({where})" if where else ""
            self.found[key] = f"{what}{detail}: {own.name}, {source}, program {program}, thread {thread}"

    def check(self) -> None:
        """Raises what was found.

        Raises:
            KernelFault: there is something.
        """
        if self.found:
            lines = list(self.found.values())
            more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
            raise KernelFault("\n  ".join([f"{self.kernel}, as compiled:", *lines[:MOST], *more]))


def differ(a: Any, b: Any) -> Any:
    """Where bits differ, but for those of two NaN: which bits an operation gives a NaN is not specified."""
    out = a != b
    if out.any():
        for kind in NAN_ABOVE.get(a.dtype.itemsize, ()):
            top = a.dtype.type((1 << (8 * a.dtype.itemsize - 1)) - 1)
            out = out & ~(((a & top) > a.dtype.type(kind)) & ((b & top) > a.dtype.type(kind)))
    return out


def chosen(threads: Any, count: int) -> Any:
    """The indices of threads that run an instruction: all of them where ``threads`` is None."""
    return np.arange(count) if threads is None else np.flatnonzero(threads)
