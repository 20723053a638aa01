"""Tensor maps, and copies by TMA from memory that they describe (PTX ISA, "Tensors" and "cp.async.bulk.tensor").

A copy takes a box of a tensor. What of it lies outside the tensor is zeros in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from moe_ref.conformance.ptx.accesses import HINTS, address
from moe_ref.conformance.ptx.emit import Emitter
from moe_ref.conformance.ptx.faults import chosen
from moe_ref.conformance.ptx.mbarrier import TensorCopy
from moe_ref.conformance.ptx.text import Instruction, Unreadable

SPANS = (0, 32, 64, 128)  # bytes of a row of shared memory that is swizzled, by the number of the mode
MOST_BOX = 256  # elements of a box in one dimension
ALIGNED = 128  # bytes, of a box in shared memory
UNIT = 16  # bytes of which addresses and strides must be multiples


@dataclass(frozen=True)
class TensorMap:
    """What the host tells TMA about a tensor; dimensions are in order of PTX, the last in memory first.

    Attributes:
        tensor: whose memory it describes, from its first element on.
        shape: elements of each dimension.
        strides: bytes from one element to the next.
        box: elements that one copy takes.
        span: bytes of a row that is swizzled, or 0.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    span: int

    @staticmethod
    def of(descriptor: Any, metadata: dict[str, Any]) -> TensorMap:
        """The map that Triton's launcher makes of a `TensorDescriptor`.

        Args:
            descriptor: it.
            metadata: of the compiled kernel, for this argument: box, element, swizzle.

        Raises:
            ValueError: a GPU's driver would refuse the map.
            Unreadable: a form that is not known.
        """
        size = metadata["elem_size"]
        rounds = getattr(descriptor, "round_f32_to_tf32", False)  # Triton 3.6 has no such option
        if metadata["fp4_padded"] or descriptor.padding != "zero" or rounds:
            raise Unreadable("a tensor map: must pad with zeros, and leave elements as they are")
        if size != descriptor.base.element_size():
            raise ValueError(f"a tensor map of {descriptor.base.dtype}: the kernel takes elements of {size} bytes")
        shape, box = tuple(reversed(descriptor.shape)), tuple(reversed(metadata["block_size"]))
        strides = tuple(stride * size for stride in reversed(descriptor.strides))
        out = TensorMap(descriptor.base, shape, strides, box, SPANS[metadata["swizzle"]])
        out._check(size)
        return out

    def _check(self, size: int) -> None:
        inner = self.box[0] * size
        last = sum((count - 1) * stride for count, stride in zip(self.shape, self.strides, strict=True)) + size
        there = self.tensor.untyped_storage().nbytes() - self.tensor.storage_offset() * size
        for what, holds in (
            (f"address={self.tensor.data_ptr():#x}", self.tensor.data_ptr() % UNIT == 0),
            (f"strides={self.strides[1:]}", all(stride % UNIT == 0 for stride in self.strides[1:])),
            (f"strides={self.strides}", self.strides[0] == size),
            (f"shape={self.shape}, beyond its tensor's memory", last <= there),
            (f"box={self.box}", all(0 < own <= MOST_BOX for own in self.box) and inner % UNIT == 0),
            (f"box={self.box}, swizzled in {self.span} bytes", self.span in (0, inner)),
        ):
            if not holds:
                raise ValueError(f"a tensor map with {what}: no device may be given it")

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return self.strides[0]

    def elements(self, first: Any) -> tuple[Any, Any]:
        """Of boxes that begin at ``first`` [boxes, dimensions]: [boxes, elements] offsets in bytes, and what is inside.

        Elements are in the order in which they lie in shared memory.
        """
        offsets: Any = np.zeros((len(first), 1), np.int64)
        inside: Any = np.ones((len(first), 1), bool)
        for axis in range(len(self.box)):
            at = first[:, axis, None] + np.arange(self.box[axis])
            good = (at >= 0) & (at < self.shape[axis])
            offsets = (at * self.strides[axis])[:, :, None] + offsets[:, None, :]
            inside = good[:, :, None] & inside[:, None, :]
            offsets, inside = offsets.reshape(len(first), -1), inside.reshape(len(first), -1)
        return offsets, inside


def swizzled(at: Any, span: Any) -> Any:
    """Addresses in shared memory, where rows of a span are swizzled: bits from 4 on, with those from 7 on.

    A span of 128 bytes takes three bits, of 64 two, of 32 one, of 0 none (PTX ISA, "Swizzling modes").
    """
    return at ^ ((at >> 3) & (span - UNIT if span else 0))


def handle(e: Emitter, own: Instruction) -> None:
    """``cp.async.bulk.tensor`` of 1 to 5 dimensions into shared memory, which counts for an mbarrier."""
    words = [word for word in own.opcode[5:] if word not in HINTS]
    known = (
        ["shared::cta", "global", "mbarrier::complete_tx::bytes"],
        ["shared::cluster", "global", "mbarrier::complete_tx::bytes"],
    )
    target, source, *rest = own.operands
    if words not in known or len(rest) != 1 or not isinstance(source, tuple) or not isinstance(source[1], tuple):
        raise Unreadable(f"{own.name}: unknown form")
    at = ", ".join(e.read(o, "s32") for o in source[1])
    where = f"{address(e, target)}, {address(e, source[0])}, [{at}], {address(e, rest[0])}"
    e.line(f"copy_tensor(m, {e.name(own, 'i')}, {where}, {e.threads(own)})")


def copy_tensor(
    m: Any, own: Instruction, target: Any, source: Any, first: list[Any], barrier: Any, threads: Any
) -> None:
    """Issues copies: memory is read now, and lands when the mbarrier's phase is waited for."""
    who = chosen(threads, m.threads)
    maps = np.broadcast_to(source, m.threads)
    for place in np.unique(maps[who]).tolist():
        mine = who[maps[who] == place]
        tensor_map = m.maps.get(place)
        if tensor_map is None or len(first) != len(tensor_map.box):
            raise Unreadable(f"line {own.line}: {own.name}: must name a tensor map of {len(first)} dimensions")
        at = np.stack([np.broadcast_to(o, m.threads)[mine] for o in first], axis=1).astype(np.int64)
        _copy(m, own, tensor_map, np.broadcast_to(target, m.threads), at, np.broadcast_to(barrier, m.threads), mine)


def _copy(m: Any, own: Instruction, tensor_map: TensorMap, target: Any, at: Any, barrier: Any, who: Any) -> None:
    offsets, inside = tensor_map.elements(at)
    values = m.memory.gather(own, tensor_map.tensor.data_ptr() + offsets, inside, tensor_map.item, who)
    data = values.view(np.uint8).reshape(len(who), -1, UNIT)
    begins = target[who]
    crooked = begins % ALIGNED != 0
    if crooked.any():
        first = int(np.argmax(crooked))
        where = f"byte {begins[first]}, must be a multiple of {ALIGNED}"
        m.faults.add(own, "misaligned copy to shared memory", m.labels(who[first]), where)
    chunks = swizzled(begins[:, None] + UNIT * np.arange(data.shape[1]), tensor_map.span)
    for number, thread in enumerate(who.tolist()):
        if chunks[number].min() < 0 or chunks[number].max() + UNIT > m.shared.size:
            m.faults.add(own, "shared memory out of bounds", m.labels(thread))
            continue
        places = chunks[number] + m.shared.base[thread]
        m.shared.see_write(own, np.full(len(places), thread), places, UNIT, by_tma=True)
        m.shared.flying[m.shared._units(places, UNIT)] += 1
        m.barriers.copy(
            own, thread, int(barrier[thread] + m.shared.base[thread]), TensorCopy(own, places, data[number])
        )


HELPERS: dict[str, Any] = {"copy_tensor": copy_tensor}
