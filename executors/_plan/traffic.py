"""The bytes of a call, message by message: what executors.parallel sends, from the code of its transports.

`executors._plan.simulation` counts them in that code, and tests/parallel/test_plan_bytes.py between real processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from executors._plan.world import World

COMPARISON, HEADS, ROWS, WEIGHTS, RESULTS = "comparison", "heads", "rows", "weights", "results"
HEAD = 3 * 4  # bytes of a slot's head: its row, expert and k, in int32
NUMBER = 8  # bytes of a number of a comparison


class Way(NamedTuple):
    """How tokens travel, and how results come back: options of `executors.parallel.ExpertParallel`."""

    dispatch: str
    returns: str

    def __str__(self) -> str:
        return f"{self.dispatch} {self.returns}"


TO_ALL = tuple(Way("all_to_all", returns) for returns in ("slot", "rank"))
REDUCED = tuple(Way("all_reduce", returns) for returns in ("slot", "rank"))
WAYS = TO_ALL + REDUCED


@dataclass(frozen=True)
class RowSizes:
    """What a number takes.

    Attributes:
        hidden: H.
        number: bytes of one of x.
        weight: bytes of a slot's weight, in its dtype.
    """

    hidden: int
    number: int = 2
    weight: int = 4

    @property
    def row(self) -> int:
        """Bytes of a row of x."""
        return self.hidden * self.number

    @property
    def sum(self) -> int:
        """Bytes of a sum over slots, in at least fp32."""
        return self.hidden * max(self.number, 4)


@dataclass(frozen=True, eq=False)
class Message:
    """One exchange.

    Attributes:
        name: what for.
        sent: [W, W] bytes that rank s sends to rank r; nothing to itself.
    """

    name: str
    sent: np.ndarray


def messages(world: World, way: Way, sizes: RowSizes, backward: bool) -> list[Message]:
    """What travels, in the order in which it does.

    Args:
        world: of all ranks; under "all_reduce" all have the tokens of rank 0.
        way: how.
        sizes: of numbers.
        backward: in the backward pass, with gradients of x and of the slots' weights; else in the forward pass.
    """
    if way.dispatch == "all_reduce":
        return reduced(int(world.tokens[0]), world.top_k, world.ranks, way.returns, sizes, backward)
    compared, out, back = _compared(world.ranks), world.rows * sizes.row, _returned(world, way, sizes)
    if backward:
        sent = [(COMPARISON, compared), (ROWS, out), (COMPARISON, compared), (RESULTS, back)]
        sent.append((WEIGHTS, world.slots.T * sizes.weight))
    else:
        sent = [(COMPARISON, compared), (HEADS, world.slots * HEAD), (ROWS, out)]
        sent += [(WEIGHTS, world.slots * sizes.weight), (RESULTS, back)]
    return [Message(name, _between(own)) for name, own in sent]


def reduced(tokens: int, top_k: int, ranks: int, returns: str, sizes: RowSizes, backward: bool) -> list[Message]:
    """What travels under "all_reduce", where all ranks have the same T tokens: as `messages`."""
    slots = tokens * top_k
    count, size = (slots, sizes.row) if returns == "slot" else (tokens, sizes.sum)
    sent = [(COMPARISON, _compared(ranks))] * (2 if backward else 1)
    sent += [(RESULTS, own * size) for own in _parts(count, ranks)]
    if backward:
        sent += [(WEIGHTS, own * sizes.weight) for own in _parts(slots, ranks)]
    return [Message(name, _between(own)) for name, own in sent]


def _compared(ranks: int) -> np.ndarray:
    """[W, W] bytes by which ranks compare what they pass and tell their sizes."""
    return np.full((ranks, ranks), NUMBER * 7)


def _returned(world: World, way: Way, sizes: RowSizes) -> np.ndarray:
    """[W, W] bytes of results, which go where rows or slots came from."""
    return world.slots.T * sizes.row if way.returns == "slot" else world.rows.T * sizes.sum


def _parts(count: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """[W, W] rows that go to the rank that adds them, and sums that go from it to all."""
    size = -(-count // ranks)
    parts = np.clip(count - size * np.arange(ranks), 0, size)
    to_adders = np.tile(parts, (ranks, 1))
    return to_adders, to_adders.T


def spread_to_all(rows: np.ndarray, size: int) -> np.ndarray:
    """[W, W] bytes where each rank gives its rows [W], of so many bytes each, to all others."""
    return _between(np.tile(rows[:, None] * size, (1, len(rows))))


def _between(sent: np.ndarray) -> np.ndarray:
    """Without what stays."""
    return np.asarray(sent * (1 - np.eye(len(sent), dtype=sent.dtype)))


def total(found: list[Message]) -> np.ndarray:
    """[W, W] bytes of all messages."""
    return np.asarray(sum(own.sent for own in found))


def by_name(found: list[Message], rank: int) -> dict[str, int]:
    """Bytes that a rank sends, by what they are for."""
    out: dict[str, int] = {}
    for own in found:
        out[own.name] = out.get(own.name, 0) + int(own.sent[rank].sum())
    return out


def busiest(sent: np.ndarray) -> int:
    """The rank that has most to send or to receive, whichever is more."""
    return int(np.maximum(sent.sum(1), sent.sum(0)).argmax())
