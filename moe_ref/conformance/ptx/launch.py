"""Launches a compiled kernel on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_ref.conformance.ptx import fresh as _fresh
from moe_ref.conformance.ptx.approximations import Approximate
from moe_ref.conformance.ptx.counters import Counting, KernelCounts
from moe_ref.conformance.ptx.device_memory import Segment
from moe_ref.conformance.ptx.faults import Faults
from moe_ref.conformance.ptx.fresh import Fresh
from moe_ref.conformance.ptx.machine import Machine
from moe_ref.conformance.ptx.tensor_map import TensorMap
from moe_ref.conformance.ptx.text import Unreadable
from moe_ref.conformance.ptx.translate import Translated, translated

SIDE_BY_SIDE = 4096  # threads of programs that run together


@dataclass(frozen=True)
class How:
    """How kernels are run.

    Attributes:
        seed: of the errors of approximations, within what the ISA allows; None rounds them to nearest.
        reverse: whether the last programs run first.
        contracts: whether a product and a sum without a rounding mode are one fma, where the kernel was compiled to
            allow it; an assembler is free to do so.
        together: threads of programs that run side by side; 1 runs one program at a time.
        counts: whether instructions and accesses are counted; then a launch takes up to twice as long.
    """

    seed: int | None = None
    reverse: bool = False
    contracts: bool = False
    together: int = SIDE_BY_SIDE
    counts: bool = False


def launch(
    ptx: str, arguments: Sequence[Any], grid: Sequence[int], shared: int, fresh: Fresh, how: How | None = None
) -> KernelCounts | None:
    """Runs all programs of a grid, and gives the counts if those are asked for.

    Args:
        ptx: the text of the kernel.
        arguments: tensors, numbers and tensor maps, in the order of its parameters; beyond them are null pointers.
        grid: up to three sizes.
        shared: bytes of shared memory that a program gets.
        fresh: memory that nobody wrote yet.
        how: kernels are run.

    Raises:
        KernelFault: the kernel did what it may not do.
        Unreadable: an instruction is not known; it names the instruction and its line.
    """
    how = how or How()
    kernel = translated(ptx, how.contracts)
    sizes = [*grid, 1, 1][:3]
    given = [*zip(kernel.text.parameters, [*arguments, *[0] * 9], strict=False)]
    addresses = kernel.text.addresses
    maps = {addresses[own.name]: value for own, value in given if isinstance(value, TensorMap)}
    parameters = {own.name: _bytes(own.kind, value) for own, value in given if not isinstance(value, TensorMap)}
    segments = segments_of(kernel, arguments, fresh)
    programs = np.array([(x, y, z) for z, y, x in product(*map(range, reversed(sizes)))], np.int64).reshape(-1, 3)
    if how.reverse:
        programs = programs[::-1]
    faults, approximate = Faults(kernel.text.name), Approximate(how.seed)
    each = max(1, how.together // kernel.text.threads)
    counting = Counting(kernel.text, kernel.blocks) if how.counts else None
    for first in range(0, len(programs), each):
        own = programs[first : first + each]
        places = own, sizes, parameters, segments, shared
        machine = Machine(kernel, *places, faults, approximate, fresh.poison, maps, counting)
        machine.run()
    faults.check()
    return None if counting is None else counting.counts(len(programs))


def _bytes(kind: str, value: Any) -> bytes:
    """A parameter as a kernel reads it."""
    if isinstance(value, Tensor):
        value = value.data_ptr()
    if kind[0] == "f":
        return np.array(value, f"f{int(kind[1:]) // 8}").tobytes()
    size = int(kind[1:]) // 8
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def segments_of(kernel: Translated, arguments: Sequence[Any], fresh: Fresh) -> list[Segment]:
    """The memory of the tensors, one segment for each storage."""
    tensors: dict[int, list[tuple[Tensor, bool]]] = {}
    for own, argument in zip(kernel.text.parameters, arguments, strict=False):
        value = argument.tensor if isinstance(argument, TensorMap) else argument
        if isinstance(value, Tensor) and value.numel():
            if value.device.type != "cpu":
                raise Unreadable(f"{own.name}: must be a tensor of the CPU, is on {value.device}")
            storage = value.untyped_storage()
            tensors.setdefault(storage.data_ptr(), []).append((value, own.name in kernel.outputs))
    segments = []
    for base, group in tensors.items():
        storage = group[0][0].untyped_storage()
        data = _fresh.bytes_of(storage)
        known, outputs = fresh.known(storage), any(out for _, out in group)
        segments.append(Segment(base, data, _valid(group, len(data)), known, outputs, kernel.memory_unit))
    return segments


def _valid(group: list[tuple[Tensor, bool]], size: int) -> Any:
    """[bytes] which belong to a tensor, without the gaps between strides; None if all do."""
    if any(own.is_contiguous() and own.numel() * own.element_size() == size for own, _ in group):
        return None
    valid = np.zeros(size, bool)
    for own, _ in group:
        item = own.element_size()
        view = torch.from_numpy(valid)[own.storage_offset() * item :].as_strided(
            (*own.shape, item), (*(stride * item for stride in own.stride()), 1)
        )
        view.fill_(True)
    return None if valid.all() else valid
