"""A shadow of memory for threads of one group: who wrote and read a unit since the group last met.

Of shared memory a group is a warp. Since Volta its lanes need not run side by side (PTX ISA 9.2, "Independent Thread
Scheduling"), and the warp is no scope of the memory model: only ``bar.sync`` and ``bar.warp.sync`` order what lanes do
in memory, ``shfl.sync`` does not. Of global memory a group is a program.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.faults import chosen

PLACES = 2048  # a tag is the group's moment times 2048, plus a thread's place in the group from 1
SEVERAL, SAME = 2047, 2046  # in place of one thread: several, and several that wrote the same
GROUPS = 1 << 31


class Moments:
    """When the threads of each group last met.

    Args:
        group: [threads] the number of each thread's group.
        place: [threads] its place there, from 0.

    Attributes:
        tags: [threads] with which each marks what it touches.
    """

    def __init__(self, group: Any, place: Any) -> None:
        self.tags = (GROUPS + np.asarray(group, np.int64)) * PLACES + place + 1

    def meet(self, threads: Any) -> None:
        """These threads have met, or all where that is None."""
        self.tags[chosen(threads, len(self.tags))] += GROUPS * PLACES


class Touched:
    """Who touched each unit of some memory last. Groups know nothing of one another here.

    Args:
        units: of the memory.
    """

    def __init__(self, units: int) -> None:
        self.writer, self.reader = np.zeros(units, np.int64), np.zeros(units, np.int64)

    def read(self, tags: Any, units: Any) -> Any:
        """Notes reads of [threads, n] units; gives where another of the group wrote since it met."""
        tag = tags[:, None]
        writer = self.writer[units]
        before = _others(self.reader[units], tag)
        new = np.where(before, tag | SEVERAL, tag) if before.any() else np.broadcast_to(tag, units.shape)
        self._mark(self.reader, units, new, SEVERAL)
        found = _others(writer, tag)
        return found & (writer % PLACES != SAME) if found.any() else found

    def write(self, tags: Any, units: Any, changes: Any = True) -> Any:
        """Notes writes; gives where another of the group wrote something else, or read, since it met.

        ``changes`` [threads, 1] tells where memory changes: threads that write the same do not race.
        """
        tag = tags[:, None]
        found = _others(self.writer[units], tag) | _others(self.reader[units], tag)
        self._mark(self.writer, units, np.broadcast_to(tag, units.shape), SAME)
        return found & changes

    def _mark(self, shadow: Any, units: Any, tags: Any, several: int) -> None:
        """Sets tags; where several threads of a group set one at once, theirs has ``several`` for a place."""
        shadow[units] = tags
        other = _others(shadow[units], tags)
        if other.any():
            shadow[units[other]] = tags[other] // PLACES * PLACES + several


def _others(found: Any, tag: Any) -> Any:
    """Where a tag is of the same moment of the same group, but of another thread."""
    return ((found ^ tag) - 1).view(np.uint64) < PLACES - 1
