"""Shared memory seen by the async proxy: wgmma's reads and TMA's writes, and the fences between them and all else.

What threads do is in the generic proxy. An access of one proxy after one of the other, to the same memory, needs a
``fence.proxy.async`` between them, by the thread that did the first, or by one that met it at a barrier (PTX ISA,
"Async proxy" and "Proxy-preserved base causality order").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.shared import EPOCH, LANDED, SEVERAL, SharedMemory
from moe_ref.conformance.ptx.text import Instruction

NO_FENCE = "no fence.proxy.async between it and what threads {} there"


class AsyncProxy:
    """A second shadow of shared memory, of the same units.

    Args:
        shared: the memory.

    Attributes:
        reading: of a unit, how many wgmma in flight read it.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        units, warps = len(shared.writer), shared.count // 32
        self.each = shared.each // 32  # warps of a program
        self.reading = np.zeros(units, np.int16)
        self._clock = 1
        self._read, self._written = np.zeros((2, units), np.int32), np.zeros((2, units), np.int32)  # clock and tag
        self._fenced_at, self._fenced_in = np.zeros(warps, np.int32), np.zeros(warps, np.int32)  # clock and epoch
        self._epochs = np.zeros((2, warps // self.each), np.int32)  # the last two in which any warp fenced
        self._landing = np.zeros(units, np.int32)  # the copy that a unit comes from
        self._seen: list[Any] = [np.zeros(warps, bool)]  # [copy][warps] who waited for it

    def fence(self, threads: Any) -> None:
        """``fence.proxy.async``."""
        warps = self.warps(threads)
        self._clock += 1
        self._fenced_at[warps] = self._clock - 1
        epochs = self.shared.epoch[::32][warps]
        self._fenced_in[warps] = epochs
        programs = warps // self.each
        newer = self._epochs[1][programs] < epochs
        self._epochs[0][programs[newer]] = self._epochs[1][programs[newer]]
        self._epochs[1][programs] = epochs

    def warps(self, threads: Any) -> Any:
        """The warps of some threads."""
        count = self.shared.count // 32
        return np.arange(count) if threads is None else np.flatnonzero(threads.reshape(count, 32).any(axis=1))

    def see_load(self, units: Any, tags: Any) -> None:
        """Notes what threads read, with tags as of `shared`."""
        self._read[0, units], self._read[1, units] = self._clock, tags

    def see_store(self, own: Instruction, who: Any, units: Any, tags: Any) -> None:
        """Checks and notes what threads write, with tags as of `shared`."""
        self._see_write(own, who, units)
        self._written[0, units], self._written[1, units] = self._clock, tags

    def _see_write(self, own: Instruction, who: Any, units: Any) -> None:
        if self.reading.any():
            self.shared._note(own, "writes shared memory that a wgmma in flight reads", self.reading[units] > 0, who)

    def arrived(self, who: Any, units: Any, writer: Any) -> Any:
        """[who, units] whether they come from TMA, and the warp waited for it."""
        return (writer % EPOCH == LANDED) & np.stack(self._seen)[self._landing[units], (who // 32)[:, None]]

    def see_copy(self, own: Instruction, who: Any, units: Any) -> None:
        """Checks fences before TMA writes [who, units]."""
        self._see_write(own, who, units)
        self._check(own, "read", who, units, self._read)
        self._check(own, "wrote", who, units, self._written)

    def see_matrix(self, own: Instruction, groups: Any, units: Any) -> None:
        """Checks what wgmma of warp groups reads [groups, units], and holds it until `release`."""
        shared, who = self.shared, 128 * groups
        writer, epoch = shared.writer[units], shared.epoch[who][:, None]
        shared._note(own, "reads shared memory that nobody wrote", writer == 0, who)
        recent = writer >= epoch
        if recent.any():
            recent &= ~np.all([self.arrived(who + 32 * warp, units, writer) for warp in range(4)], axis=0)
            shared._note(own, "race: reads shared memory that a warp wrote since the last barrier", recent, who)
        shared._note(own, "reads shared memory that a copy in flight writes", shared.flying[units] > 0, who)
        for warp in range(4):
            self._check(own, "wrote", who + 32 * warp, units, self._written)
        self._count(groups, units, 1)

    def release(self, groups: Any, units: Any) -> None:
        """What wgmma read has been read now: others may write there after the next barrier."""
        self._count(groups, units, -1)
        self.shared.reader[units] = (self.shared.epoch[128 * groups] + SEVERAL)[:, None]

    def _count(self, groups: Any, units: Any, by: int) -> None:
        """Adds to `reading`; one warp group has each unit once, but two of a program may have the same."""
        within = groups % max(1, self.each // 4)
        for number in np.unique(within):
            self.reading[units[within == number]] += by

    def land(self, units: Any, threads: Any) -> int:
        """TMA wrote units, and some threads waited for it; gives the copy's number for `sees`."""
        self._seen.append(np.zeros_like(self._seen[0]))
        self.sees(len(self._seen) - 1, threads)
        self._landing[units] = len(self._seen) - 1
        self.shared.writer[units] = self.shared.epoch[threads[0]] + LANDED
        return len(self._seen) - 1

    def sees(self, copy: int, threads: Any) -> None:
        """Threads, by their indices, waited for a copy."""
        self._seen[copy][threads // 32] = True

    def _check(self, own: Instruction, verb: str, who: Any, units: Any, done: Any) -> None:
        """Whether there was a fence after what threads had done, and before ``who`` came."""
        when, tag = done[:, units]
        if not when.any():
            return
        programs = who // 32 // self.each
        fenced = self._fenced_at.reshape(-1, self.each)
        late = when > fenced.min(axis=1)[programs][:, None]  # else all warps fenced since
        if not late.any():
            return
        epoch, warp = tag - tag % EPOCH, tag % EPOCH - 1
        mine, now = who // 32, self.shared.epoch[who][:, None]
        alone = warp < LANDED - 1
        theirs = programs[:, None] * self.each + np.minimum(warp, self.each - 1)
        good = alone & (self._fenced_at[theirs] >= when)
        after = (self._fenced_in[mine][:, None] > epoch) | (alone & (theirs == mine[:, None]))
        good |= (self._fenced_at[mine][:, None] >= when) & after
        for epochs in self._epochs:
            between = epochs[programs][:, None]
            good |= (between > epoch) & (between < now)
        self.shared._note(own, NO_FENCE.format(verb), late & ~good, who)
