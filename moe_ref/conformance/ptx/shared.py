"""Shared memory of programs side by side, and a shadow of it: who wrote and who read last, since which barrier."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moe_ref.conformance.ptx.counters import Counting
from moe_ref.conformance.ptx.faults import Faults, chosen, differ
from moe_ref.conformance.ptx.moments import Moments, Touched
from moe_ref.conformance.ptx.text import Instruction

EPOCH = 128  # a tag is 128 times the barriers passed, from 1, plus a warp from 1
SEVERAL, ATOMIC, LANDED = 127, 126, 125  # in place of a warp; the last one is TMA


class Copy(NamedTuple):
    """A copy in flight: who issued it, where it goes, and what."""

    own: Instruction
    threads: Any
    places: Any
    words: Any


class Group(NamedTuple):
    """Copies that are waited for together: [threads] whose group it is, and the copies."""

    members: Any
    copies: list[Copy]


class SharedMemory:
    """Shared memory of all programs that run side by side.

    Args:
        programs: how many.
        threads: of each.
        size: bytes of each.
        unit: the fewest bytes that one access takes; shadows are of such units.
        poison: a byte that stands where nobody wrote.
        faults: what is wrong is noted there.
        labels: gives program and thread of an index, for reports.

    Attributes:
        counting: counts all accesses, if given.
    """

    counting: Counting | None = None

    def __init__(
        self, programs: int, threads: int, size: int, unit: int, poison: int, faults: Faults, labels: Any
    ) -> None:
        self.size, self.unit, self.faults, self.labels = size, unit, faults, labels
        self.stride = -(-max(size, 16) // 16) * 16
        self.data = np.full(programs * self.stride, poison, np.uint8)
        self.count, self.each = programs * threads, threads
        self.base = np.repeat(np.arange(programs, dtype=np.int64) * self.stride, threads)
        self.writer = np.zeros(programs * self.stride // unit, np.int32)
        self.reader = np.zeros_like(self.writer)
        self.flying = np.zeros(self.writer.shape, np.int8)
        self.epoch = np.full(self.count, EPOCH, np.int32)
        self.warp = np.tile(np.arange(threads, dtype=np.int32) // 32 + 1, programs)
        thread = np.arange(self.count)
        self.lanes, self.touched = Moments(thread // 32, thread % 32), Touched(len(self.writer))
        self.open: list[Copy] = []  # not committed
        self.groups: list[Group] = []
        self.proxy: Any = None  # an `AsyncProxy`, where wgmma or TMA use this memory

    def locate(self, own: Instruction, address: Any, size: int, threads: Any) -> tuple[Any, Any]:
        """Who makes an access, and the places in `data`; those out of bounds are noted and left out."""
        who = chosen(threads, self.count)
        at = np.broadcast_to(address, self.count)[who].astype(np.int64)
        wrong = (at < 0) | (at + size > self.size)
        crooked = at % size != 0
        if wrong.any():
            first = int(np.argmax(wrong))
            where = f"byte {at[first]} of {self.size}"
            self.faults.add(own, "shared memory out of bounds", self.labels(who[first]), where)
        if crooked.any():
            first = int(np.argmax(crooked))
            where = f"byte {at[first]}, must be a multiple of {size}"
            self.faults.add(own, "misaligned access to shared memory", self.labels(who[first]), where)
        if wrong.any() or crooked.any():
            good = ~(wrong | crooked)
            who, at = who[good], at[good]
        if self.counting is not None:
            self.counting.shared_access(own, who, at, size)
        return who, at + self.base[who]

    def _units(self, places: Any, size: int) -> Any:
        return (places // self.unit)[:, None] + np.arange(size // self.unit)

    def _note(self, own: Instruction, what: str, bad: Any, who: Any) -> None:
        if bad.any():
            self.faults.add(own, what, self.labels(who[int(np.argmax(bad.any(axis=1)))]))

    def see_read(self, own: Instruction, who: Any, places: Any, size: int) -> None:
        """Checks a read against the shadow, and notes it there."""
        units = self._units(places, size)
        epoch, tag = self.epoch[who][:, None], (self.epoch[who] + self.warp[who])[:, None]
        writer = self.writer[units]
        if not writer.all():
            self._note(own, "reads shared memory that nobody wrote", writer == 0, who)
        others = (writer >= epoch) & (writer != tag)
        if self.proxy is not None and others.any():
            others &= ~self.proxy.arrived(who, units, writer)
        self._note(own, "race: reads shared memory that another warp wrote since the last barrier", others, who)
        if self.groups or self.open or self.proxy is not None:
            self._note(own, "reads shared memory that a cp.async in flight writes", self.flying[units] > 0, who)
        self._note(own, "race: reads shared memory that another lane of the warp wrote since they met",
                   self.touched.read(self.lanes.tags[who], units), who)  # fmt: skip
        before = self.reader[units]
        new = np.where((before >= epoch) & (before != tag), epoch + SEVERAL, tag)
        self._mark(self.reader, units, new, epoch)
        if self.proxy is not None:
            self.proxy.see_load(units, self.reader[units])

    def _mark(self, shadow: Any, units: Any, tags: Any, epoch: Any) -> None:
        """Sets tags; where several warps set one at once, none of theirs stays."""
        shadow[units] = tags
        other = shadow[units] != tags
        if other.any():
            shadow[units[other]] = (np.broadcast_to(epoch, units.shape)[other]) + SEVERAL

    def see_write(
        self, own: Instruction, who: Any, places: Any, size: int, changes: Any = True, by_tma: bool = False
    ) -> None:
        """Checks a write against the shadow, and notes it there.

        ``changes`` [threads, 1] tells where memory changes: two warps that write the same do not race. ``by_tma`` tells
        that threads only ask for it.
        """
        units = self._units(places, size)
        epoch, tag = self.epoch[who][:, None], (self.epoch[who] + self.warp[who])[:, None]
        writer, reader = self.writer[units], self.reader[units]
        others = (writer >= epoch) & (writer != tag) & changes
        if self.proxy is not None and others.any():
            others &= ~self.proxy.arrived(who, units, writer)
        if by_tma:
            self.proxy.see_copy(own, who, units)
        elif self.proxy is not None:
            self.proxy.see_store(own, who, units, tag)
        self._note(own, "race: writes shared memory that another warp wrote since the last barrier", others, who)
        self._note(own, "race: writes shared memory that another warp read since the last barrier",
                   (reader >= epoch) & (reader != tag) & changes, who)  # fmt: skip
        if self.groups or self.open or self.proxy is not None:
            self._note(own, "writes shared memory that a cp.async in flight writes", self.flying[units] > 0, who)
        self._note(own, "race: writes shared memory that another lane of the warp wrote or read since they met",
                   self.touched.write(self.lanes.tags[who], units, changes), who)  # fmt: skip
        self._mark(self.writer, units, np.broadcast_to(tag, units.shape), epoch)

    def load(self, own: Instruction, address: Any, dtype: Any, vector: int, threads: Any) -> tuple[Any, Any]:
        """Who loads, and [who, vector] numbers."""
        size = np.dtype(dtype).itemsize
        who, places = self.locate(own, address, size * vector, threads)
        self.see_read(own, who, places, size * vector)
        return who, self.data.view(dtype)[(places // size)[:, None] + np.arange(vector)]

    def store(self, own: Instruction, address: Any, values: list[Any], threads: Any) -> None:
        """Stores one number of each of the values for each thread."""
        size = values[0].dtype.itemsize
        who, places = self.locate(own, address, size * len(values), threads)
        new = np.stack([np.broadcast_to(value, self.count)[who] for value in values], axis=1)
        memory, at = self.data.view(new.dtype), (places // size)[:, None] + np.arange(len(values))
        changes = (memory[at] != new).any(axis=1, keepdims=True)
        self.see_write(own, who, places, size * len(values), changes)
        memory[at] = new
        other = differ(memory[at], new)
        if other.any():
            self._note(own, "threads store different values to one address of shared memory", other, who)

    def copy(self, own: Instruction, address: Any, words: Any, who_words: Any, threads: Any) -> None:
        """Issues a copy of [who, words] words, which land when they are waited for."""
        size = 4 * words.shape[1]
        who, places = self.locate(own, address, size, threads)
        if len(who) != len(who_words):
            words = words[np.isin(who_words, who)]
        self.see_write(own, who, places, size)
        units = self._units(places, size)
        self.flying[units] += 1
        self.open.append(Copy(own, who, places, words))

    def commit(self, threads: Any) -> None:
        """Copies of these threads that no group has yet become one; a thread's part of it may be empty."""
        members = np.ones(self.count, bool) if threads is None else threads
        inside, outside = _split(self.open, members)
        self.groups.append(Group(members, inside))
        self.open = outside

    def wait(self, pending: int, threads: Any) -> None:
        """Lands all groups of these threads but their newest ``pending``."""
        waits = np.ones(self.count, bool) if threads is None else threads
        newer = np.zeros(self.count, np.int32)
        kept = []
        for group in reversed(self.groups):
            lands = group.members & waits & (newer >= pending)
            newer += group.members
            landing, flying = _split(group.copies, lands)
            for copy in landing:
                self._land(copy)
            members = group.members & ~lands
            if members.any():
                kept.append(Group(members, flying))
        self.groups = kept[::-1]

    def _land(self, copy: Copy) -> None:
        size = 4 * copy.words.shape[1]
        units = self._units(copy.places, size)
        self.flying[units] = np.maximum(self.flying[units] - 1, 0)
        self.data.view(np.uint32)[(copy.places // 4)[:, None] + np.arange(size // 4)] = copy.words
        epoch = self.epoch[copy.threads][:, None]
        tag = (self.epoch[copy.threads] + self.warp[copy.threads])[:, None]
        if self.proxy is not None:
            self.proxy.see_store(copy.own, copy.threads, units, tag)
        self._mark(self.writer, units, np.broadcast_to(tag, units.shape), epoch)
        self.touched.write(self.lanes.tags[copy.threads], units)

    def barrier(self, threads: Any) -> None:
        """All threads of the programs in ``threads`` have met."""
        self.lanes.meet(threads)
        if threads is None:
            self.epoch += EPOCH
        else:
            self.epoch[threads] += EPOCH


def _split(copies: list[Copy], threads: Any) -> tuple[list[Copy], list[Copy]]:
    """The copies of these threads, and those of others."""
    inside: list[Copy] = []
    outside: list[Copy] = []
    for copy in copies:
        mine = threads[copy.threads]
        for chosen_ones, side in ((mine, inside), (~mine, outside)):
            if chosen_ones.all():
                side.append(copy)
            elif chosen_ones.any():
                threads_of, places, words = (o[chosen_ones] for o in (copy.threads, copy.places, copy.words))
                side.append(Copy(copy.own, threads_of, places, words))
    return inside, outside
