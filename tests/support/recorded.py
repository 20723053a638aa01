"""Launches on record, so that a kernel can be run again on the same memory with another text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from moe_ref.conformance.ptx import executed
from moe_ref.conformance.ptx.faults import KernelFault
from moe_ref.conformance.ptx.fresh import Fresh, bytes_of
from moe_ref.conformance.ptx.launch import launch
from moe_ref.conformance.ptx.tensor_map import TensorMap
from moe_ref.conformance.ptx.text import read


@dataclass
class Recorded:
    """One launch: its text and arguments, and the memory before and after."""

    name: str
    ptx: str
    arguments: Sequence[Any]
    grid: Sequence[int]
    shared: int
    before: dict[int, np.ndarray]
    after: dict[int, np.ndarray]

    @property
    def threads(self) -> int:
        """Of a program."""
        return read(self.ptx).threads

    def verdict(self, ptx: str) -> str:
        """What becomes of another text: the fault, "other bits", or "" if nothing shows."""
        for address, memory in _memory(self.arguments).items():
            memory[:] = self.before[address]
        try:
            launch(ptx, self.arguments, self.grid, self.shared, Fresh(executed.POISON))
        except KernelFault as fault:
            return str(fault)
        now = _memory(self.arguments)
        return "" if all((now[address] == own).all() for address, own in self.after.items()) else "other bits"


def _memory(arguments: Sequence[Any]) -> dict[int, Any]:
    tensors = [own.tensor if isinstance(own, TensorMap) else own for own in arguments]
    tensors = [own for own in tensors if isinstance(own, Tensor) and own.numel()]
    return {own.untyped_storage().data_ptr(): bytes_of(own.untyped_storage()) for own in tensors}


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within it, the first launch of each kernel's text under `executed` is recorded."""
    out: list[Recorded] = []

    def record(ptx: str, arguments: Any, grid: Any, shared: int, fresh: Fresh, how: Any) -> None:
        before = {address: memory.copy() for address, memory in _memory(arguments).items()}
        launch(ptx, arguments, grid, shared, fresh, how)
        after = {address: memory.copy() for address, memory in _memory(arguments).items()}
        if ptx not in [own.ptx for own in out]:
            name = ptx.split(".entry ")[1].split("_kernel")[0]
            out.append(Recorded(name, ptx, arguments, grid, shared, before, after))

    with patch.object(executed, "launch", record):
        yield out
