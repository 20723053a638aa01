"""A context in which Triton's launches run here, on tensors of the CPU, through the text that Triton compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ref.conformance.ptx.counters import KernelCounts
from moe_ref.conformance.ptx.fresh import Fresh, tracked
from moe_ref.conformance.ptx.launch import How, launch
from moe_ref.conformance.ptx.tensor_map import TensorMap

TARGETS = {"sm80": GPUTarget("cuda", 80, 32), "sm90": GPUTarget("cuda", 90, 32)}
MOST_SHARED = {"sm80": 163 * 1024, "sm90": 227 * 1024}  # bytes that a program may have
POISON = 0xFD  # a NaN in bf16 and fp32, and large as an integer


@dataclass
class Executed:
    """What ran in a context.

    Attributes:
        kernels: how often each kernel ran, by name and hash.
        spoil: changes the text of a kernel before it runs, given its name; None leaves it as it is.
        fresh: memory that nobody wrote.
        counts: of each launch, in order, where `How` asks for them.
    """

    fresh: Fresh
    kernels: dict[tuple[str, str], int] = field(default_factory=dict)
    spoil: Callable[[str, str], str] | None = None
    counts: list[KernelCounts] = field(default_factory=list)


class _Absent:
    """A driver of a device that is not here."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return f"{self._target}, executed"

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]


def _stop_at_ptx(*stage: Any) -> Any:
    """Triton's hook for other stages of compilation: no machine code, which takes a third of the time."""
    if not stage:
        return "no machine code", "no machine code"  # for the key of Triton's cache
    stage[1]["cubin"] = lambda _source, _metadata: b""
    return None


@contextmanager
def executed(target: str = "sm80", how: How | None = None, poison: int = POISON) -> Iterator[Executed]:
    """Within it, ``kernel[grid](...)`` compiles the kernel for the target and runs the PTX on tensors of the CPU.

    Args:
        target: a name of `TARGETS`.
        how: kernels are run.
        poison: the byte in registers, shared memory and memory of `torch.empty` that nobody wrote.

    Raises:
        KernelFault: at a launch: the kernel did what it may not do; the message names the line of its source.
        Unreadable: at a launch: an instruction is not known.
        ValueError: an argument is none of those above.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: must be one of {', '.join(map(repr, TARGETS))}")
    if how is not None and not isinstance(how, How):
        raise ValueError(f"how={how!r:.60}: must be a How or None")
    if how is not None and how.counts and target == "sm90":
        raise ValueError("how.counts=True: must be False on sm90, whose copies by TMA and products are not counted")
    if not isinstance(poison, int) or not 0 <= poison <= 255:
        raise ValueError(f"poison={poison!r:.60}: must be a whole number from 0 to 255")
    plain_run = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = plain_run(kernel, *args, grid=grid, warmup=True, **options)
        if warmup:
            return compiled
        own = kernel.signature.bind(*args, **{name: o for name, o in options.items() if name in kernel.arg_names})
        own.apply_defaults()
        if compiled.metadata.shared > MOST_SHARED[target]:
            raise ValueError(f"{compiled.metadata.shared} bytes of shared memory: at most {MOST_SHARED[target]}")
        sizes = grid(dict(own.arguments)) if callable(grid) else grid
        ptx = compiled.asm["ptx"]
        if out.spoil is not None:
            ptx = out.spoil(compiled.metadata.name, ptx)
        key = compiled.metadata.name, compiled.hash
        out.kernels[key] = out.kernels.get(key, 0) + 1
        signature = [compiled.src.signature.get(name, "constexpr") for name in own.arguments]
        own_how = how or How()
        if not compiled.metadata.enable_fp_fusion:
            own_how = replace(own_how, contracts=False)
        described = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        leaves = _flat(signature, list(own.arguments.values()), described)
        counts = launch(ptx, leaves, sizes, compiled.metadata.shared, out.fresh, own_how)
        if counts is not None:
            out.counts.append(counts)
        return compiled

    with (
        tracked(poison) as fresh,
        patch.object(JITFunction, "run", run),
        patch.object(knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx),
    ):
        out = Executed(fresh)
        driver.set_active(_Absent(target))
        try:
            yield out
        finally:
            driver.set_active(None)  # Triton looks for a real one when it next needs one


def _flat(signature: Any, values: Any, described: Iterator[dict[str, Any]]) -> list[Any]:
    """Arguments that the compiled kernel takes: none that were known when it was compiled, and no tuples.

    A tensor descriptor becomes its tensor map, shape and strides; without TMA Triton takes it apart.
    """
    if isinstance(signature, (list, tuple)):
        return [leaf for kind, value in zip(signature, values, strict=True) for leaf in _flat(kind, value, described)]
    if not isinstance(values, TensorDescriptor):
        return [] if signature == "constexpr" else [values]
    metadata = next(described, None)
    if metadata is None:
        return list(make_tensordesc_arg(values, None))
    return [TensorMap.of(values, metadata), *values.shape, *values.strides]
