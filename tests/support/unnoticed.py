"""Why nothing shows when one place of a kernel is spoiled: decided from logs or by noise, not by the executor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from meetings import Replay, meet
from recorded import Recorded
from traced import Event, Log, Noise, tracing

ORDERED = ("barrier", "wait", "commit")  # kinds of places at which threads or copies wait for one another


@dataclass
class Trial:
    """A kernel with one place spoiled.

    Attributes:
        own: the launch.
        kind, place: of what is spoiled.
        text: with it spoiled.
    """

    own: Recorded
    kind: str
    place: int
    text: str

    def verdict(self) -> tuple[str, bool]:
        """The executor's verdict, and whether accesses may meet according to the log."""
        with tracing() as self._logs:
            said = self.own.verdict(self.text)
        return said, self.kind in ORDERED and meet(self._logs)[1]

    def reason(self) -> str:
        """Why nothing shows, after a verdict that says nothing; "" if there is no reason."""
        with tracing() as self._whole:
            assert self.own.verdict(self.own.ptx) == ""
        if self.kind in ORDERED:
            return self._ordered()
        line = self.place + 1
        before, now = (
            [own for log in logs for own in log.events if own.line == line] for logs in (self._whole, self._logs)
        )
        if len(before) != len(now):
            return ""
        return self._zeros(before) if self.kind == "zeros" else self._guard(before, now)

    def _times(self, logs: list[Log]) -> list[Event]:
        """Each time that the place runs."""
        return [own for log in logs for own in log.events if own.line == self.place + 1]

    def _ordered(self) -> str:
        """A barrier, a wait or a commit."""
        if meet(self._logs)[0]:
            return ""
        if self.kind == "barrier":
            idle = all(_idle(log, self.place + 1) for log in self._whole)
            return "no access before it, or none behind it" if idle else "accesses around it do not meet"
        landed = sum(_landed(*logs, self.kind) for logs in zip(self._whole, self._logs, strict=True))
        return "waited for before it is read" if landed else "nothing is in flight"

    def _guard(self, before: list[Event], now: list[Event]) -> str:
        """A guard of a load or a store."""
        others = [~np.isin(new.threads, old.threads) for old, new in zip(before, now, strict=True)]
        if not any(own.any() for own in others):
            return "holds for all threads"
        if now[0].kind in ("load", "read"):
            return self._used(now, others)
        each = self.own.threads if now[0].kind == "write" else 1 << 30
        if all(_stores_what_is_there(own, other, each) for own, other in zip(now, others, strict=True)):
            return "the others store what is there"
        return "nobody reads what the others store" if self._same_with_noise(now, others, _anything) else ""

    def _zeros(self, before: list[Event]) -> str:
        """The size of a copy."""
        others = [~own.changes for own in before]
        if not any(own.any() for own in others):
            return "all bytes are there"
        return self._used(before, others)

    def _used(self, events: list[Event], others: list[Any]) -> str:
        """What becomes of what these threads load or copy."""
        if self._same_with_noise(events, others, _anything):
            return "the others use nothing of it"
        return "zeros meet it" if self._same_with_noise(events, others, _finite) else ""

    def _same_with_noise(self, events: list[Event], others: list[Any], draw: Any) -> bool:
        """Whether no bit depends on what these threads load, store or copy."""
        sizes = [log.programs * log.each for log in self._logs for _ in self._times([log])]
        who = [_mask(own.threads[other], size) for own, other, size in zip(events, others, sizes, strict=True)]
        for seed in range(2):
            with tracing(Noise(self.place + 1, who, partial(draw, seed))):
                if self.own.verdict(self.text) != "":
                    return False
        return True


def _mask(threads: Any, size: int) -> Any:
    out = np.zeros(size, bool)
    out[threads] = True
    return out


def _anything(seed: int, at: Any) -> Any:
    """Any bits: the finaliser of splitmix64."""
    mixed = at.astype(np.uint64) + np.uint64(2 * seed + 1)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(32))


def _finite(seed: int, at: Any) -> Any:
    """Four numbers in bf16 or fp16, or two in fp32, all finite."""
    return (_anything(seed, at) & np.uint64(0x07FF07FF07FF07FF)) + np.uint64(0x3C003C003C003C00)


def _stores_what_is_there(own: Event, other: Any, each: int) -> bool:
    """Whether these threads store what memory has, or what a thread that may store there stores."""
    places = [*zip((own.threads // each).tolist(), own.at.tolist(), strict=True)]
    values = [value.tobytes() for value in own.values]
    may = {places[n]: values[n] for n in np.flatnonzero(~other)}
    return all(may.get(places[n]) == values[n] for n in np.flatnonzero(other & own.changes))


def _removed(whole: Log, spoiled: Log, kind: str) -> Iterator[int]:
    """The events of a kind that one log has and the other lacks."""
    place = 0
    for number, own in enumerate(whole.events):
        other = spoiled.events[place] if place < len(spoiled.events) else None
        same = other is not None and (own.kind, own.line, own.pending) == (other.kind, other.line, other.pending)
        place += same
        if not same:
            assert own.kind == kind
            yield number


def _landed(whole: Log, spoiled: Log, kind: str) -> int:
    """Copies that land in the waits that are taken out, or that are in the groups that are."""
    gone = {*_removed(whole, spoiled, kind)}
    replay, found = Replay(whole), 0
    for number, own in enumerate(whole.events):
        if kind == "commit" and number in gone:
            found += replay.uncommitted()
        landed = replay.step(own)
        found += landed if number in gone else 0
    return found


def _idle(log: Log, line: int) -> bool:
    """Whether a barrier never has accesses both before and behind it, up to the barriers next to it."""
    replay, waiting = Replay(log), np.zeros(log.programs, bool)
    for own in log.events:
        if own.kind == "barrier":
            rows = np.unique(own.threads // log.each)
            if (waiting[rows] & (replay.touched[rows] > 0)).any():
                return False
            waiting[rows] = (replay.touched[rows] > 0) & (own.line == line)
        replay.step(own)
    return not (waiting & (replay.touched > 0)).any()
