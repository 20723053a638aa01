"""Counts what a kernel asks of a GPU's units while it is executed: instructions, sectors, bank conflicts, barriers.

The counts are those of the PTX text. An assembler folds some of it: moves vanish, a multiplication and a sum become
one instruction, parameters are operands. Lanes, addresses and loops are those of the machine code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ref.conformance.ptx.flow import Block
from moe_ref.conformance.ptx.kinds import kind_of
from moe_ref.conformance.ptx.text import Instruction, Text

WARP = 32
SECTOR = 32  # bytes
BANKS = 32  # of 4 bytes
WORD = 4  # bytes


@dataclass(frozen=True)
class InstructionCounts:
    """What one instruction of a kernel's text did in one launch, in all programs.

    Attributes:
        name: the opcode as it is written.
        kind: a name of `kinds.KINDS`.
        source: the line of the kernel's own text, or "".
        line: of the PTX text, from 1.
        warps: how often a warp issued it. A lane that branched elsewhere does not count. A lane whose guard is false
            does, because the instruction is issued all the same.
        requests: accesses to global memory: warps of which some lane made one.
        sectors: of 32 bytes which those touched: a sector counts once for each warp and time.
        ideal_sectors: the fewest that hold the bytes which the lanes of a warp asked for, each byte once.
        bytes: which all lanes asked for, in global memory.
        wavefronts: passes that its accesses to shared memory take (see `wavefronts_of`).
        ideal_wavefronts: passes that they would take without bank conflicts.
        shared_bytes: which all lanes asked for, in shared memory.
    """

    name: str
    kind: str
    source: str
    line: int
    warps: int
    requests: int
    sectors: int
    ideal_sectors: int
    bytes: int
    wavefronts: int
    ideal_wavefronts: int
    shared_bytes: int


@dataclass(frozen=True)
class KernelCounts:
    """What one launch of a kernel did.

    Attributes:
        kernel: its name.
        programs: of its grid.
        threads: of a program.
        instructions: each instruction of its text, in order.
        read: bytes of all sectors of global memory that some program read, each once in the launch.
        written: the same of those that some program wrote.
    """

    kernel: str
    programs: int
    threads: int
    instructions: tuple[InstructionCounts, ...]
    read: int
    written: int

    def total(self, field: str, *kinds: str) -> int:
        """The sum of one field of `InstructionCounts` over all instructions, or those of some kinds."""
        return sum(getattr(own, field) for own in self.instructions if not kinds or own.kind in kinds)

    def by_kind(self) -> dict[str, int]:
        """Warp instructions, by kind."""
        out: dict[str, int] = {}
        for own in self.instructions:
            out[own.kind] = out.get(own.kind, 0) + own.warps
        return out

    def by_source(self, field: str) -> dict[str, int]:
        """The sum of one field, by line of the kernel's own text; lines where it is 0 are left out."""
        out: dict[str, int] = {}
        for own in self.instructions:
            out[own.source] = out.get(own.source, 0) + getattr(own, field)
        return {source: count for source, count in out.items() if count}

    @property
    def barriers(self) -> float:
        """Barriers that a program passes, on average."""
        warps = -(-self.threads // WARP) * self.programs
        return self.total("warps", "barrier") / warps if warps else 0.0


class Counting:
    """Counts of one launch, as it runs.

    Args:
        text, blocks: what runs.
    """

    def __init__(self, text: Text, blocks: Sequence[Block]) -> None:
        self.text, self.blocks = text, blocks
        self._runs: dict[int, int] = {}  # warps, by block
        self._seen: dict[int, Any] = {}  # of the accesses of an instruction, by its place in the PTX: 7 sums
        self._touched: dict[tuple[int, bool], Any] = {}  # sectors, by address of a segment and whether written

    def block(self, number: int, threads: Any, count: int) -> None:
        """A block begins to run in these of so many threads; None is all."""
        warps = count // WARP if threads is None else int(threads.reshape(-1, WARP).any(axis=1).sum())
        self._runs[number] = self._runs.get(number, 0) + warps

    def global_access(self, own: Instruction, parts: list[tuple[Any, Any, Any]], size: int) -> None:
        """Accesses of ``size`` bytes: for each segment, it, who, and [who, vector] places in it."""
        who = np.concatenate([part[1] for part in parts] or [np.zeros(0, np.int64)])
        if not len(who):
            return
        at = np.concatenate([segment.base + places[:, 0] for segment, _, places in parts])
        self._add(own, [*sectors_of(who, at, size), len(who) * size, 0, 0, 0])
        for segment, _, places in parts:
            first = segment.base // SECTOR
            sectors = (segment.base + places[:, 0]) // SECTOR - first
            for wrote in _directions(own):
                key = segment.base, wrote
                if key not in self._touched:
                    self._touched[key] = np.zeros(segment.end // SECTOR - first + 1, bool)
                self._touched[key][sectors] = True

    def shared_access(self, own: Instruction, who: Any, at: Any, size: int) -> None:
        """Accesses of ``size`` bytes at ``at``, bytes of a program's own shared memory."""
        if len(who):
            self._add(own, [0, 0, 0, 0, *wavefronts_of(who, at, size), len(who) * size])

    def _add(self, own: Instruction, numbers: list[int]) -> None:
        key = id(own)
        self._seen[key] = self._seen.get(key, 0) + np.array(numbers, np.int64)

    def counts(self, programs: int) -> KernelCounts:
        """The counts, when all programs have run."""
        text, found = self.text, []
        for block in self.blocks:
            warps = self._runs.get(block.number, 0)
            for own in [*block.instructions, *([block.branch] if block.branch else [])]:
                seen = map(int, self._seen.get(id(own), np.zeros(7, np.int64)))
                found.append(InstructionCounts(own.name, kind_of(own), own.source, own.line, warps, *seen))
        read, written = (
            SECTOR * sum(int(own.sum()) for (_, wrote), own in self._touched.items() if wrote is side)
            for side in (False, True)
        )
        return KernelCounts(text.name, programs, text.threads, tuple(found), read, written)


def _directions(own: Instruction) -> tuple[bool, ...]:
    """Whether an access writes; an atomic does both."""
    return {"ld": (False,), "cp": (False,), "st": (True,)}.get(own.opcode[0], (False, True))


def sectors_of(who: Any, at: Any, size: int) -> tuple[int, int, int]:
    """Requests, sectors, and the fewest sectors, of accesses to global memory.

    Args:
        who: threads; 32 in a row are a warp.
        at: their addresses, multiples of ``size``, so that none crosses a sector.
        size: bytes of an access: a power of two up to 32.
    """
    key = _once(((who // WARP).astype(np.int64) << 48) | at)  # each place of a warp once
    distinct = np.bincount(key >> 48)
    sectors = len(_once(key // SECTOR))
    return int((distinct > 0).sum()), sectors, int((-(-distinct * size // SECTOR)).sum())


def wavefronts_of(who: Any, at: Any, size: int) -> tuple[int, int]:
    """Passes of accesses to shared memory, and how many there are without bank conflicts.

    Up to 4 bytes of each lane go in one pass for a warp, 8 bytes in one for each half, 16 in one for each quarter, and
    so do rows of ``ldmatrix``; halves and quarters without an access take none. In each, lanes that ask for one word
    share it, and a bank gives one word at a time. So the passes are the most words that are asked of one bank.

    Args:
        who: threads; 32 in a row are a warp.
        at: bytes from the start of a program's shared memory.
        size: bytes of an access: a power of two up to 16.
    """
    words = max(size // WORD, 1)
    together = WARP // words
    group = (who // together).astype(np.int64)
    word = ((at // WORD)[:, None] + np.arange(words)).astype(np.int64)
    key = _once(((group[:, None] << 32) | word).reshape(-1))  # each word of a group once
    group_of, bank = key >> 32, key % BANKS
    groups = int(group_of[-1]) + 1
    most = np.bincount(group_of * BANKS + bank, minlength=groups * BANKS).reshape(-1, BANKS).max(axis=1)
    return int(most.sum()), int((most > 0).sum())


def _once(numbers: Any) -> Any:
    """Each number once, in order."""
    numbers = np.sort(numbers)
    first = np.ones(len(numbers), bool)
    np.not_equal(numbers[1:], numbers[:-1], out=first[1:])
    return numbers[first]
