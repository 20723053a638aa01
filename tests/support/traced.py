"""A log of what a launch does to memory; it is kept beside the executor's own checks and knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

from moe_ref.conformance.ptx import launch
from moe_ref.conformance.ptx.machine import Machine

WARP = 32


@dataclass
class Event:
    """What one instruction does, once, in the programs that run side by side.

    Attributes:
        kind: "read", "write", "atomic" and "copy" are of shared memory; "load" and "store" of global memory; "commit",
            "wait" and "barrier".
        line: of the text; 0 for "commit", "wait" and a warp's barrier.
        threads: [n] which threads.
        at: [n] where: bytes from the start of a program's shared memory, or addresses.
        size: bytes of each access.
        changes: [n] whether memory changes; of a "copy", whether it copies rather than fills with zeros.
        values: [n, size] bytes that a "store" or "write" stores.
        pending: groups that a "wait" leaves in flight.
    """

    kind: str
    line: int
    threads: Any
    at: Any = None
    size: int = 0
    changes: Any = None
    values: Any = None
    pending: int = 0


@dataclass
class Log:
    """The events of one machine: programs that run side by side.

    Attributes:
        events: in order.
        programs, each, shared: programs, threads of each, and bytes of shared memory of each.
    """

    events: list[Event]
    programs: int
    each: int
    shared: int


@dataclass
class Noise:
    """Other bits in place of what some threads load, store or copy at one line: the same for the same address.

    Attributes:
        line: of the text.
        who: for each time that the line runs, [threads] which threads.
        draw: gives 64 bits for each of an array of addresses.
        times: how often it has run.
    """

    line: int
    who: list[Any]
    draw: Callable[[Any], Any]
    times: int = 0

    def put(self, values: list[Any], at: Any) -> list[Any]:
        """The values that lie one after the other from [threads] addresses, [threads] each, with noise."""
        who, self.times = self.who[self.times], self.times + 1
        out = []
        for place, value in enumerate(values):
            size = value.dtype.itemsize
            other = self.draw(at + place * size).astype(f"u{size}").view(value.dtype)
            out.append(np.where(who, other, value))
        return out


class Traced(Machine):
    """A machine that keeps a log, and puts noise where it is told to."""

    def __init__(self, *args: Any, logs: list[Log], noise: Noise | None = None) -> None:
        super().__init__(*args)
        self._log: list[Event] = []
        self._noise = noise
        logs.append(Log(self._log, len(self.programs), self.each, self.shared.size))
        self._plain = {name: getattr(self.shared, name) for name in ("store", "commit", "wait", "copy")}
        for name in self._plain:
            setattr(self.shared, name, getattr(self, f"_shared_{name}"))
        self._plain_store = self.memory.store
        self.memory.store = self._global_store  # type: ignore[method-assign]

    def _here(self, address: Any, threads: Any) -> tuple[Any, Any]:
        who = np.arange(self.threads) if threads is None else np.flatnonzero(threads)
        return who, np.broadcast_to(address, self.threads)[who].astype(np.int64)

    def _within(self, at: Any, size: int) -> Any:
        return (at >= 0) & (at + size <= self.shared.size)

    def _see(self, kind: str, own: Any, address: Any, size: int, threads: Any) -> None:
        who, at = self._here(address, threads)
        good = self._within(at, size)
        self._log.append(Event(kind, own.line, who[good], at[good], size))

    def _altered(self, own: Any, values: list[Any], address: Any, shared: bool = False) -> list[Any]:
        if self._noise is None or self._noise.line != own.line:
            return values
        at = np.broadcast_to(address, self.threads).astype(np.int64)
        if shared:
            at = at + (np.arange(self.threads) // self.each << 32)
        return self._noise.put([np.broadcast_to(value, self.threads) for value in values], at)

    def load_shared(self, own: Any, address: Any, dtype: Any, vector: int, threads: Any) -> list[Any]:
        self._see("read", own, address, np.dtype(dtype).itemsize * vector, threads)
        return self._altered(own, super().load_shared(own, address, dtype, vector, threads), address, True)

    def load_global(self, own: Any, address: Any, dtype: Any, vector: int, threads: Any) -> list[Any]:
        self._log.append(Event("load", own.line, *self._here(address, threads), np.dtype(dtype).itemsize * vector))
        return self._altered(own, super().load_global(own, address, dtype, vector, threads), address)

    def load_matrices(self, own: Any, address: Any, count: int, trans: bool, threads: Any) -> list[Any]:
        first = np.arange(self.threads) % 32 < 8 * count
        self._see("read", own, address, 16, first if threads is None else first & threads)
        return super().load_matrices(own, address, count, trans, threads)

    def atomic(self, own: Any, space: str, operation: str, address: Any, values: list[Any], threads: Any) -> Any:
        if space == "shared":
            self._see("atomic", own, address, np.broadcast_to(values[0], self.threads).dtype.itemsize, threads)
        return super().atomic(own, space, operation, address, values, threads)

    def barrier(self, own: Any, threads: Any) -> None:
        self._log.append(Event("barrier", own.line, self._here(0, threads)[0]))
        super().barrier(own, threads)

    def warp_barrier(self, threads: Any) -> None:
        """Of a program of one warp it is the barrier of the program."""
        if self.each == WARP:
            self._log.append(Event("barrier", 0, self._here(0, threads)[0]))
        super().warp_barrier(threads)

    def _bytes(self, values: list[Any], who: Any) -> Any:
        stacked = np.stack([np.broadcast_to(value, self.threads)[who] for value in values], axis=1)
        return np.ascontiguousarray(stacked).view(np.uint8).reshape(len(who), stacked.shape[1] * stacked.itemsize)

    def _shared_store(self, own: Any, address: Any, values: list[Any], threads: Any) -> None:
        values = self._altered(own, values, address, True)
        who, at = self._here(address, threads)
        new = self._bytes(values, who)
        size = new.shape[1]
        good = self._within(at, size)
        who, at, new = who[good], at[good], new[good]
        old = self.shared.data[(who // self.each * self.shared.stride + at)[:, None] + np.arange(size)]
        self._log.append(Event("write", own.line, who, at, size, (old != new).any(axis=1), new))
        self._plain["store"](own, address, values, threads)

    def _global_store(self, own: Any, address: Any, values: list[Any], threads: Any) -> None:
        values = self._altered(own, values, address)
        who, at = self._here(address, threads)
        new = self._bytes(values, who)
        changes = np.zeros(len(who), bool)
        for segment in self.memory.segments:
            mine = (at >= segment.base) & (at + new.shape[1] <= segment.end)
            old = segment.data[(at[mine] - segment.base)[:, None] + np.arange(new.shape[1])]
            changes[mine] = (old != new[mine]).any(axis=1)
        self._log.append(Event("store", own.line, who, at, new.shape[1], changes, new))
        self._plain_store(own, address, values, threads)

    def copy(self, own: Any, target: Any, source: Any, size: int, given: Any, threads: Any) -> None:
        self._given, self._source = np.broadcast_to(given, self.threads) == size, source
        super().copy(own, target, source, size, given, threads)

    def _shared_copy(self, own: Any, address: Any, words: Any, who_words: Any, threads: Any) -> None:
        whole = np.zeros((words.shape[1], self.threads), words.dtype)
        whole[:, who_words] = words.T
        words = np.stack(self._altered(own, [*whole], self._source))[:, who_words].T
        who, at = self._here(address, threads)
        size = 4 * words.shape[1]
        good = self._within(at, size)
        self._log.append(Event("copy", own.line, who[good], at[good], size, self._given[who[good]]))
        self._plain["copy"](own, address, words, who_words, threads)

    def _shared_commit(self, threads: Any) -> None:
        self._log.append(Event("commit", 0, self._here(0, threads)[0]))
        self._plain["commit"](threads)

    def _shared_wait(self, pending: int, threads: Any) -> None:
        self._log.append(Event("wait", 0, self._here(0, threads)[0], pending=pending))
        self._plain["wait"](pending, threads)


@contextmanager
def tracing(noise: Noise | None = None) -> Iterator[list[Log]]:
    """Within it, launches keep logs, one for each batch of programs."""
    logs: list[Log] = []
    with patch.object(launch, "Machine", partial(Traced, logs=logs, noise=noise)):
        yield logs
