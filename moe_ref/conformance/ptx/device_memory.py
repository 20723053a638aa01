"""Global memory: the tensors of a launch at their own addresses, and a shadow: what is valid, written, by whom."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.counters import Counting
from moe_ref.conformance.ptx.faults import Faults, chosen, differ
from moe_ref.conformance.ptx.moments import Moments, Touched
from moe_ref.conformance.ptx.text import Instruction

ATOMIC = -1  # in place of a program


class Segment:
    """The memory of one or more tensors that share it.

    Attributes:
        base: its address.
        data: [bytes] uint8, the memory itself.
        valid: [bytes] bool, which bytes belong to a tensor, or None for all.
        known: [bytes] bool, which bytes somebody wrote, or None for all; shared by launches.
        outputs: whether the kernel may store here.
        writer, reader: of a unit, the program that did so last in this launch, from 1.
        touched: of a unit, the threads of a program that did so since its last barrier.
    """

    def __init__(self, base: int, data: Any, valid: Any, known: Any, outputs: bool, unit: int) -> None:
        self.base, self.data, self.valid, self.known, self.outputs = base, data, valid, known, outputs
        units = len(data) // unit + 1 if outputs else 0
        self.writer = np.zeros(units, np.int32)
        self.reader = np.zeros(units, np.int32)
        self.touched = Touched(units)

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.base + len(self.data)


class DeviceMemory:
    """All memory that a kernel may touch.

    Args:
        segments: without overlaps.
        unit: the fewest bytes of an access; shadows are of such units.
        faults: what is wrong is noted there.
        labels: gives program and thread of an index.
        program: of each thread, from 1.

    Attributes:
        counting: counts all accesses, if given.
    """

    counting: Counting | None = None

    def __init__(self, segments: list[Segment], unit: int, faults: Faults, labels: Any, program: Any) -> None:
        self.segments = sorted(segments, key=lambda own: own.base)
        self.starts = np.array([own.base for own in self.segments], np.int64)
        self.unit, self.faults, self.labels, self.program = unit, faults, labels, program
        self.moments = Moments(program, np.arange(len(program)) % int((program == program[0]).sum()))
        self.last: dict[int, Segment] = {}

    def _parts(self, own: Instruction, at: Any, size: int) -> list[tuple[Segment, Any]]:
        """Segments, and which accesses are in each: a slice for all."""
        if not len(at):
            return []
        low, high = int(at.min()), int(at.max()) + size
        last = self.last.get(own.line)
        if last is not None and last.base <= low and high <= last.end:
            return [(last, slice(None))]
        place = np.searchsorted(self.starts, at, side="right") - 1
        parts: list[tuple[Segment, Any]] = []
        for number in np.unique(place):
            inside = np.flatnonzero(place == number)
            if number >= 0:
                segment = self.segments[number]
                parts.append((segment, inside[at[inside] + size <= segment.end]))
        if len(parts) == 1 and len(parts[0][1]) == len(at):
            self.last[own.line] = parts[0][0]
        return parts

    def _access(
        self, own: Instruction, address: Any, size: int, vector: int, threads: Any
    ) -> list[tuple[Segment, Any, Any]]:
        """For each segment that is met: it, who, and [who, vector] places in it."""
        count = len(self.program)
        who = chosen(threads, count)
        at = np.broadcast_to(address, count)[who].astype(np.int64)
        whole = size * vector
        crooked = at % whole != 0
        if crooked.any():
            first = int(np.argmax(crooked))
            where = f"address {at[first]:#x}, must be a multiple of {whole}"
            self.faults.add(own, "misaligned access to memory", self.labels(who[first]), where)
            who, at = who[~crooked], at[~crooked]
        out = []
        met = 0
        for segment, inside in self._parts(own, at, whole):
            own_at, own_who = at[inside], who[inside]
            places = (own_at - segment.base)[:, None] + np.arange(vector) * size
            if segment.valid is not None:
                good = segment.valid[places].all(axis=1)
                if not good.all():
                    self._outside(own, own_at[~good], own_who[~good], segment)
                    places, own_who = places[good], own_who[good]
                    met += int((~good).sum())
            met += len(own_who)
            out.append((segment, own_who, places))
        if met != len(at):
            within = np.zeros(len(at), bool)
            for _, inside in self._parts(own, at, whole):
                within[inside] = True
            self._outside(own, at[~within], who[~within], None)
        if self.counting is not None:
            self.counting.global_access(own, out, whole)
        return out

    def _outside(self, own: Instruction, at: Any, who: Any, segment: Segment | None) -> None:
        if segment is not None:
            where = f"{at[0] - segment.base} bytes into it, in a gap between strides or beyond the tensor"
        else:
            nearest = min(self.segments, key=lambda s: max(s.base - at[0], at[0] - s.end), default=None)
            where = f"address {at[0]:#x}"
            if nearest is not None:
                where = f"{at[0] - nearest.base} bytes from the start of an argument of {len(nearest.data)}"
        self.faults.add(own, "memory out of bounds", self.labels(who[0]), where)

    def _units(self, places: Any, size: int) -> Any:
        first = places // self.unit
        if size == self.unit:
            return first
        return (first[:, :, None] + np.arange(size // self.unit)).reshape(len(places), -1)

    def load(self, own: Instruction, address: Any, dtype: Any, vector: int, threads: Any) -> list[tuple[Any, Any]]:
        """Who loads, and [who, vector] numbers, a part for each segment."""
        size = np.dtype(dtype).itemsize
        out = []
        for segment, who, places in self._access(own, address, size, vector, threads):
            if segment.known is not None:
                unknown = ~segment.known[places]
                if unknown.any():
                    first = who[int(np.argmax(unknown.any(axis=1)))]
                    self.faults.add(own, "reads memory that nobody wrote", self.labels(first))
            self._see_race(own, segment, who, places, size)
            out.append((who, _view(segment, dtype, places)))
        return out

    def _see_race(self, own: Instruction, segment: Segment, who: Any, places: Any, size: int) -> None:
        """Checks a read against what other programs wrote, and notes it."""
        if segment.outputs:
            units, program = self._units(places, size), self.program[who][:, None]
            writer = segment.writer[units]
            others = (writer != 0) & (writer != program)
            if others.any():
                first = who[int(np.argmax(others.any(axis=1)))]
                self.faults.add(own, "race: reads memory that another program writes", self.labels(first))
            self._mark(segment.reader, units, program)
            what = "race: reads memory that another thread of the program wrote since the last barrier"
            self._note(own, what, segment.touched.read(self.moments.tags[who], units), who)

    def gather(self, own: Instruction, address: Any, inside: Any, size: int, who: Any) -> Any:
        """[who, elements] elements of one tensor's memory, of ``size`` bytes each, by addresses; zeros outside.

        A box may have parts that nobody wrote, as long as nothing comes of them.
        """
        out = np.zeros(address.shape, f"u{size}")
        threads = np.broadcast_to(who[:, None], address.shape)[inside]
        at = address[inside]
        for segment, part in self._parts(own, at, size):
            places, own_who = (at[part] - segment.base)[:, None], threads[part]
            if segment.valid is not None and not segment.valid[places].all():
                bad = ~segment.valid[places][:, 0]
                self._outside(own, at[part][bad], own_who[bad], segment)
            self._see_race(own, segment, own_who, places, size)
            if len(places) == len(at):
                out[inside] = _view(segment, f"u{size}", places)[:, 0]
                return out
        if len(at):
            self._outside(own, at, threads, None)
        return out

    def _note(self, own: Instruction, what: str, bad: Any, who: Any) -> None:
        if bad.any():
            self.faults.add(own, what, self.labels(who[int(np.argmax(bad.any(axis=1)))]))

    def _mark(self, shadow: Any, units: Any, program: Any) -> None:
        before = shadow[units]
        new = np.where((before == 0) | (before == program), program, ATOMIC)
        shadow[units] = new
        other = shadow[units] != new
        if other.any():
            shadow[units[other]] = ATOMIC

    def see_write(
        self, own: Instruction, segment: Segment, who: Any, places: Any, size: int, changes: Any = True
    ) -> None:
        """Checks a write against the shadows, and notes it there.

        ``changes`` [who, 1] tells where memory changes: programs that write the same do not race. None is for atomics.
        """
        if segment.known is not None:
            segment.known[(places[:, :, None] + np.arange(size)).reshape(-1)] = True
        if not segment.outputs:
            self.faults.add(own, "writes memory that its text has no store to", self.labels(who[0]))
            return
        units, program = self._units(places, size), self.program[who][:, None]
        writer, reader = segment.writer[units], segment.reader[units]
        mine = np.full_like(program, ATOMIC) if changes is None else program
        others = (writer != 0) & (writer != mine) & (True if changes is None else changes)
        if others.any():
            first = who[int(np.argmax(others.any(axis=1)))]
            self.faults.add(own, "race: writes memory that another program writes", self.labels(first))
        readers = (reader != 0) & (reader != program) & (True if changes is None else changes)
        if readers.any():
            first = who[int(np.argmax(readers.any(axis=1)))]
            self.faults.add(own, "race: writes memory that another program reads", self.labels(first))
        if changes is not None:
            self._note(own, "race: writes memory that another thread of the program touched since the last barrier",
                       segment.touched.write(self.moments.tags[who], units, changes), who)  # fmt: skip
        segment.writer[units] = np.where((writer != 0) & (writer != mine), ATOMIC, mine)  # nobody's alone

    def store(self, own: Instruction, address: Any, values: list[Any], threads: Any) -> None:
        """Stores one number of each of the values for each thread."""
        dtype = values[0].dtype
        count = len(self.program)
        for segment, who, places in self._access(own, address, dtype.itemsize, len(values), threads):
            if not len(who):
                continue
            new = np.stack([np.broadcast_to(value, count)[who] for value in values], axis=1)
            changes = (_view(segment, dtype, places) != new).any(axis=1, keepdims=True)
            self.see_write(own, segment, who, places, dtype.itemsize, changes)
            _put(segment, places, new)
            other = differ(_view(segment, dtype, places), new)
            if other.any():
                first = who[int(np.argmax(other.any(axis=1)))]
                self.faults.add(own, "threads store different values to one address", self.labels(first))


def _words(segment: Segment, size: int) -> tuple[Any, int]:
    """The memory as words of a size, and where the first begins."""
    skip = -segment.base % size
    end = skip + (len(segment.data) - skip) // size * size
    return segment.data[skip:end].view(f"u{size}"), skip


def _view(segment: Segment, dtype: Any, places: Any) -> Any:
    size = np.dtype(dtype).itemsize
    words, skip = _words(segment, size)
    return words[(places - skip) // size].view(dtype)


def _put(segment: Segment, places: Any, values: Any) -> None:
    size = values.dtype.itemsize
    words, skip = _words(segment, size)
    words[(places - skip) // size] = values.view(words.dtype)
