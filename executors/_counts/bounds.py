"""The least time that each unit of a card needs for what a kernel asks of it."""

from __future__ import annotations

import re
from math import prod

from executors._counts.cards import Card
from moe_ref.conformance.ptx.counters import SECTOR, InstructionCounts, KernelCounts

FOLDED = ("move", "parameter")  # kinds of instructions that an assembler drops
UNITS = {"issue": "issue slots", "tensor": "tensor cores", "shared": "shared memory", "l2": "L2 cache", "dram": "DRAM"}
SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)\.")


def bounds(counts: KernelCounts, card: Card) -> dict[str, float]:
    """Seconds by unit, a key of `UNITS`: a count divided by a rate.

    Each is a lower bound if the machine code has no fewer instructions than the text without `FOLDED`; the units work
    at the same time, so the kernel takes at least the longest. Nothing waits in this model.
    """
    return {
        "issue": issued(counts) / card.issue,
        "tensor": sum(flops(own) / card.tensor[_dtype(own)] for own in counts.instructions if own.kind == "tensor"),
        "shared": counts.total("wavefronts") / card.wavefronts,
        "l2": l2_bytes(counts) / card.l2,
        "dram": (counts.read + counts.written) / card.dram,
    }


def issued(counts: KernelCounts) -> int:
    """Warp instructions that take an issue slot."""
    return counts.total("warps") - counts.total("warps", *FOLDED)


def l2_bytes(counts: KernelCounts) -> int:
    """Bytes that pass between the L2 cache and multiprocessors.

    Stores move all sectors that they touch, and so do copies past the L1 cache (.cg). That cache keeps sectors of
    which loads and other copies take a part at a time: of theirs the fewest count.
    """
    cached = [own for own in counts.instructions if own.name.startswith(("ld.", "cp.async.ca."))]
    kept = sum(own.sectors - own.ideal_sectors for own in cached)
    return SECTOR * (counts.total("sectors") - kept)


def flops(own: InstructionCounts) -> int:
    """Operations of a product of matrices, in all warps."""
    found = SHAPE.search(own.name)
    assert found is not None, own.name
    return 2 * own.warps * prod(map(int, found.groups()))


def _dtype(own: InstructionCounts) -> str:
    """Of an mma's first operand."""
    return own.name.split(".")[7]


def bound_by(times: dict[str, float]) -> str:
    """The unit that needs most time."""
    return max(times, key=lambda unit: times[unit])
