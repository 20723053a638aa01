"""Compiles the kernels for devices that are not here, by launching them without one.

The launchers run on tensors without values, so what is compiled is what they would launch. This needs Triton, but
neither a GPU nor the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from executors._protocol import Unavailable
from executors._triton.device import INTERPRETED

TARGETS = {
    "sm75": GPUTarget("cuda", 75, 32),
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its compile-time arguments, and what was compiled.

    Attributes:
        kernel: the kernel's name.
        constants: its compile-time arguments and options, by name.
        compiled: Triton's compiled kernel.
    """

    kernel: str
    constants: dict[str, Any]
    compiled: Any


class _Absent:
    """A driver of a device that is not here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_current_device(self) -> str:
        return self._name

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]


@contextmanager
def compiling(target: str) -> Iterator[list[Launch]]:
    """A context in which each launch compiles its kernel for the target, is listed, and runs nothing.

    Args:
        target: a name of `TARGETS`.

    Raises:
        Unavailable: the kernels are interpreted in this process.
    """
    if INTERPRETED:
        raise Unavailable("kernels are interpreted in this process: TRITON_INTERPRET must be unset to compile them")
    launches: list[Launch] = []
    plain_run = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = plain_run(kernel, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(kernel.fn.__name__, dict(options), compiled))
        return compiled

    JITFunction.run = run
    driver.set_active(_Absent(target))
    try:
        yield launches
    finally:
        driver.set_active(None)  # Triton looks for a real one when it next needs one
        JITFunction.run = plain_run
