"""Which accesses to shared memory meet without a barrier, or meet a copy in flight: found from a log alone.

The executor keeps the last who wrote and who read a unit. Here all accesses between two barriers are laid side by side,
and every unit is looked at when the second barrier comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from traced import Event, Log

NOBODY = 1 << 40
ACCESSES = ("read", "write", "atomic", "copy")


class Replay:
    """Goes through a log.

    Attributes:
        meets, may_meet: whether accesses met so far; and whether they did, if a write that changes nothing meets reads.
        touched: [programs] accesses since the last barrier.
        flying: [programs, units] copies in flight.
    """

    def __init__(self, log: Log) -> None:
        self.each = log.each
        self.unit = min((own.size for own in log.events if own.kind in ACCESSES), default=4)
        shape = log.programs, -(-max(log.shared, 1) // self.unit)
        kinds = ("read", "write", "change", "atomic")
        self.first = {kind: np.full(shape, NOBODY, np.int64) for kind in kinds}  # the least thread
        self.last = {kind: np.full(shape, -1, np.int64) for kind in kinds}  # and the greatest
        self.flying = np.zeros(shape, np.int32)
        self.touched = np.zeros(log.programs, np.int64)
        self.commits = np.zeros(log.programs * log.each, np.int64)  # of each thread
        self.copies: list[tuple[Any, Any, Any]] = []  # in flight: threads, units, and their commits before
        self.meets = self.may_meet = False

    def step(self, own: Event) -> int:
        """Does what one event does; gives how many copies land in it."""
        if own.kind in ACCESSES:
            self._access(own)
        elif own.kind == "barrier":
            self._end(np.unique(own.threads // self.each))
        elif own.kind == "commit":
            self.commits[own.threads] += 1
        elif own.kind == "wait":
            return self._land(own)
        return 0

    def uncommitted(self) -> int:
        """Copies that no group has yet."""
        return sum(int((group == self.commits[threads]).sum()) for threads, _, group in self.copies)

    def finish(self) -> None:
        """The end of all programs."""
        self._end(slice(None))

    def _places(self, own: Event) -> tuple[Any, Any]:
        units = (own.at // self.unit)[:, None] + np.arange(own.size // self.unit)
        return (own.threads // self.each)[:, None], units

    def _access(self, own: Event) -> None:
        rows, units = self._places(own)
        self.meets |= bool(self.flying[rows, units].any())
        np.add.at(self.touched, own.threads // self.each, 1)
        if own.kind == "copy":
            np.add.at(self.flying, (np.broadcast_to(rows, units.shape), units), 1)
            self.copies.append((own.threads, units, self.commits[own.threads]))
            self.meets |= bool((self.flying[rows, units] > 1).any())
        if own.kind in ("write", "copy"):
            changes = own.changes if own.kind == "write" else np.ones(len(own.threads), bool)
            self._write(own.threads, units, changes)
        else:
            self._mark(own.kind, own.threads, units)

    def _write(self, threads: Any, units: Any, changes: Any) -> None:
        """Two threads that write the same do not meet."""
        rows, own = (threads // self.each)[:, None], threads[:, None]
        other = (self.first["write"][rows, units] < own) | (self.last["write"][rows, units] > own)
        self.meets |= bool(other[changes].any())
        self._mark("write", threads, units)
        self._mark("change", threads[changes], units[changes])

    def _mark(self, kind: str, threads: Any, units: Any) -> None:
        own = np.broadcast_to(threads[:, None], units.shape)
        np.minimum.at(self.first[kind], (own // self.each, units), own)
        np.maximum.at(self.last[kind], (own // self.each, units), own)

    def _land(self, own: Event) -> int:
        waits = np.zeros(len(self.commits), bool)
        waits[own.threads] = True
        flying, landed = self.copies, 0
        self.copies = []
        for threads, units, group in flying:
            lands = waits[threads] & (group < self.commits[threads] - own.pending)
            rows = np.broadcast_to((threads // self.each)[:, None], units.shape)
            np.add.at(self.flying, (rows[lands], units[lands]), -1)
            self._write(threads[lands], units[lands], np.ones(int(lands.sum()), bool))
            landed += int(lands.sum())
            if not lands.all():
                self.copies.append((threads[~lands], units[~lands], group[~lands]))
        return landed

    def _end(self, rows: Any) -> None:
        self.meets |= self._together(rows, "change")
        self.may_meet |= self._together(rows, "write")
        for kind in self.first:
            self.first[kind][rows], self.last[kind][rows] = NOBODY, -1
        self.touched[rows] = 0

    def _together(self, rows: Any, written: str) -> bool:
        """Whether several threads touched one unit, in more than one of the ways."""
        kinds = ("read", written, "atomic")
        first = np.min([self.first[kind][rows] for kind in kinds], axis=0)
        last = np.max([self.last[kind][rows] for kind in kinds], axis=0)
        several = np.sum([self.last[kind][rows] >= 0 for kind in kinds], axis=0) > 1
        return bool((several & (first < last)).any())


def meet(logs: list[Log]) -> tuple[bool, bool]:
    """Whether any accesses meet; and whether any do if writes count that change nothing, which may be reported too."""
    replays = [Replay(log) for log in logs]
    for log, replay in zip(logs, replays, strict=True):
        for own in log.events:
            replay.step(own)
        replay.finish()
    return any(own.meets for own in replays), any(own.meets or own.may_meet for own in replays)
