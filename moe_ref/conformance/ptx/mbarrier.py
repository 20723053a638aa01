"""``mbarrier``: phases that end when all have arrived and all bytes of TMA have landed (PTX ISA, "mbarrier").

A copy by TMA lands, and its bytes count, when somebody waits for its phase; not before, so that a kernel that does not
wait is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_ref.conformance.ptx.accesses import address
from moe_ref.conformance.ptx.emit import Emitter
from moe_ref.conformance.ptx.faults import Faults
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.proxies import AsyncProxy
from moe_ref.conformance.ptx.shared import SharedMemory
from moe_ref.conformance.ptx.text import Instruction, Symbol, Unreadable

MOST_BYTES = (1 << 20) - 1  # of a phase


class TensorCopy(NamedTuple):
    """A copy by TMA in flight: places of 16 bytes each in shared memory, and [places, 16] bytes."""

    own: Instruction
    places: Any
    data: Any


@dataclass
class Phase:
    """An mbarrier in its present phase.

    Attributes:
        count: arrivals of each phase.
        pending: those that are missing.
        expected: bytes of copies that were announced.
        parity: of the phase.
        copies: issued in it.
        landed: number of the copies that ended the phase before.
    """

    count: int
    pending: int
    expected: int = 0
    parity: int = 0
    copies: list[TensorCopy] = field(default_factory=list)
    landed: int = 0

    @property
    def missing(self) -> int:
        """Bytes that were announced, but are in no copy."""
        return self.expected - sum(own.data.size for own in self.copies)


class Barriers:
    """All mbarriers of programs side by side, by their places in shared memory.

    Args:
        meet: called with the threads for which a phase is over: what others did before they arrived is in order now.

    Attributes:
        stuck: a wait that cannot end now: the instruction, one of its threads, and what is missing.
        events: how often anything was done that a wait may wait for.
    """

    def __init__(self, shared: SharedMemory, proxy: AsyncProxy, faults: Faults, meet: Callable[[Any], None]) -> None:
        self.shared, self.proxy, self.faults, self.meet = shared, proxy, faults, meet
        self.phases: dict[int, Phase] = {}
        self.stuck: tuple[Instruction, int, str] | None = None
        self.events = 0

    def init(self, own: Instruction, at: Any, count: Any, threads: Any) -> None:
        """``mbarrier.init``."""
        counts = np.broadcast_to(count, self.shared.count)
        who, places = self.shared.locate(own, at, 8, threads)
        self.shared.see_write(own, who, places, 8)
        for thread, place in zip(who.tolist(), places.tolist(), strict=True):
            self._end(own, thread, place)
            self.phases[place] = Phase(int(counts[thread]), int(counts[thread]))
            self.events += 1

    def inval(self, own: Instruction, at: Any, threads: Any) -> None:
        """``mbarrier.inval``."""
        who, places = self.shared.locate(own, at, 8, threads)
        self.shared.see_write(own, who, places, 8)
        for thread, place in zip(who.tolist(), places.tolist(), strict=True):
            if place not in self.phases:
                self._uninitialised(own, thread)
            self._end(own, thread, place)
            self.phases.pop(place, None)

    def _end(self, own: Instruction, thread: int, place: int) -> None:
        phase = self.phases.get(place)
        if phase is not None and phase.copies:
            self.faults.add(own, "ends an mbarrier while copies are in flight", self.shared.labels(thread))

    def _uninitialised(self, own: Instruction, thread: int) -> None:
        self.faults.add(own, "uses an mbarrier that nobody initialised", self.shared.labels(thread))

    def arrive(self, own: Instruction, at: Any, expected: Any, threads: Any) -> None:
        """``mbarrier.arrive``, with bytes that are expected or none, thread after thread."""
        many = np.broadcast_to(expected, self.shared.count)
        who, places = self.shared.locate(own, at, 8, threads)
        self.shared.see_read(own, who, places, 8)
        for thread, place in zip(who.tolist(), places.tolist(), strict=True):
            phase = self.phases.get(place)
            if phase is None:
                self._uninitialised(own, thread)
                continue
            phase.expected += int(many[thread])
            phase.pending -= 1
            if phase.pending < 0 or phase.expected > MOST_BYTES:
                what = "arrives at a phase of an mbarrier that is over, and nobody waited for it"
                self.faults.add(own, what, self.shared.labels(thread))
            if phase.pending == 0 and not phase.expected and not phase.copies:
                self._next(phase, np.array([thread]))
            self.events += 1

    def copy(self, own: Instruction, thread: int, place: int, copy: TensorCopy) -> None:
        """A copy by TMA, whose bytes count for the mbarrier at a place."""
        phase = self.phases.get(place)
        if phase is None:
            self._uninitialised(own, thread)
            return
        phase.copies.append(copy)
        self.events += 1

    def wait(self, own: Instruction, at: Any, parity: Any, threads: Any) -> Any:
        """``mbarrier.try_wait.parity``: [threads] whether the phase of that parity is over."""
        out = np.ones(self.shared.count, bool)
        who, places = self.shared.locate(own, at, 8, threads)
        self.shared.see_read(own, who, places, 8)
        waited = np.broadcast_to(parity, self.shared.count)[who] & 1
        keys, groups = np.unique(2 * places + waited, return_inverse=True)
        for number, key in enumerate(keys.tolist()):
            mine = who[groups == number]
            phase = self.phases.get(key // 2)
            if phase is None:
                self._uninitialised(own, int(mine[0]))
                continue
            if phase.parity == key % 2 and phase.pending == 0 and phase.missing == 0:
                self._next(phase, mine)
            if phase.parity != key % 2:
                self.proxy.sees(phase.landed, mine)
                over = np.zeros(self.shared.count, bool)
                over[mine] = True
                self.meet(over)
                continue
            out[mine] = False
            self.stuck = own, int(mine[0]), f"{phase.pending} arrivals and {phase.missing} bytes are missing"
        return out

    def _next(self, phase: Phase, threads: Any) -> None:
        """The phase is over: its copies land."""
        if phase.copies:
            places = np.concatenate([copy.places for copy in phase.copies])
            self.shared.data.reshape(-1, 16)[places // 16] = np.concatenate([copy.data for copy in phase.copies])
            units = self.shared._units(places, 16)
            self.shared.flying[units] -= 1
            phase.landed = self.proxy.land(units, threads)
        phase.copies, phase.expected, phase.pending = [], 0, phase.count
        phase.parity ^= 1
        self.events += 1

    def finish(self) -> None:
        """Programs have ended."""
        for place, phase in self.phases.items():
            for copy in phase.copies[:1]:
                thread = place // self.shared.stride * self.shared.each
                self.faults.add(copy.own, "the program ends before it has landed", self.shared.labels(thread))


def handle(e: Emitter, own: Instruction) -> None:
    """``mbarrier.init``, ``inval``, ``arrive``, ``arrive.expect_tx``, ``try_wait.parity``, in shared memory."""
    words = [word for word in own.opcode[1:] if word not in ("shared", "shared::cta", "b64")]
    instruction, threads = e.name(own, "i"), e.threads(own)
    if words == ["init"]:
        count = e.read(own.operands[1], "u32")
        e.line(f"m.barriers.init({instruction}, {address(e, own.operands[0])}, {count}, {threads})")
    elif words == ["inval"]:
        e.line(f"m.barriers.inval({instruction}, {address(e, own.operands[0])}, {threads})")
    elif words in (["arrive"], ["arrive", "expect_tx"]) and own.operands[0] == Symbol("_"):
        many = e.read(own.operands[2], "u32") if len(words) == 2 else "U32(0)"
        if len(own.operands) != len(words) + 1:
            raise Unreadable(f"{own.name}: unknown form")
        e.line(f"m.barriers.arrive({instruction}, {address(e, own.operands[1])}, {many}, {threads})")
    elif words == ["try_wait", "parity"] and len(own.operands) == 3:
        where, parity = address(e, own.operands[1]), e.read(own.operands[2], "u32")
        e.write(own.operands[0], "p", f"m.barriers.wait({instruction}, {where}, {parity}, {threads})", own)
    else:
        raise Unreadable(f"{own.name}: unknown form")


HANDLERS: dict[str, Handler] = {"mbarrier": handle}
