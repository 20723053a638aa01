"""The kernels of ``triton`` as they are compiled, executed on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import triton

from executors._triton.device import Device, standing_in
from moe_ref.conformance.ptx.executed import POISON, Executed, executed
from moe_ref.conformance.ptx.launch import How

MULTIPROCESSORS = 3  # few, so that a program takes several tiles
LACKS_FENCE = [int(part) for part in re.findall(r"\d+", triton.__version__)[:3]] < [3, 7, 1]
fenced = pytest.mark.skipif(LACKS_FENCE, reason="Triton before 3.7.1 has no fence between cp.async and wgmma: reported")


@contextmanager
def executing(how: How | None = None, poison: int = POISON, target: str = "sm80") -> Iterator[Executed]:
    """Within it, ``triton`` takes tensors of the CPU, and what runs is compiled for a target of `executed`."""
    with standing_in(Device(target, MULTIPROCESSORS)), executed(target, how, poison) as out:
        yield out
