"""How tokens come to experts and results come back: two pairs of adjoint operations for each way.

A *slot* is a place k of a token. `out` takes tokens to slots, `back` adds slots to tokens; the gradient of either is
the other. Each begins to send when it is called; what it returns waits for what arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from executors.parallel.waiting import Arriving, Wire

ROWS, SLOTS, RESULTS = "where tokens are sent", "where slots are sent", "where results come back"


class Needs(NamedTuple):
    """What gradients are needed: on one rank, or on any.

    Attributes:
        rows: that of x.
        weights: that of the slots' weights.
        any: some gradient, be it of parameters.
    """

    rows: bool
    weights: bool
    any: bool


class Transport(Protocol):
    """Between the T tokens of a rank, with K slots each, and the S slots whose experts the rank has.

    Attributes:
        wire: to the other ranks.
        number: of the call, among those of the group; ranks compare it in the backward pass.
        ids: [S, 1] the slots' experts, counted from this rank's first; others name empty slots.
        needs: what gradients any rank needs.
    """

    @property
    def wire(self) -> Wire:
        """To the other ranks."""

    @property
    def number(self) -> int:
        """Of the call."""

    @property
    def ids(self) -> Tensor:
        """[S, 1]."""

    @property
    def needs(self) -> Needs:
        """The same on all ranks."""

    def out(self, rows: Tensor) -> Arriving:
        """[S, H] the rows [T, H] of the slots' tokens."""

    def back(self, slots: Tensor) -> Arriving:
        """[T, H] sums over each token's slots, in at least fp32, rounded once to the slots' dtype."""

    def weights_out(self, weights: Tensor) -> Arriving:
        """[S, 1] the slots' weights, of [T, K]."""

    def weights_back(self, weights: Tensor) -> Arriving:
        """[T, K] what slots [S, 1] hold; 0 for empty slots."""

    def own(self, rows: Tensor, weights: Tensor) -> Own | None:
        """Slots of this rank's tokens [T, H] and weights [T, K]; None if none are on their way to other ranks."""


class Own(NamedTuple):
    """Slots of a rank's tokens whose experts it has itself: they need not wait for what arrives.

    Attributes:
        rows: [n, H] their tokens.
        weights: [n, 1] theirs.
        places: where they are among the S slots.
    """

    rows: Tensor
    weights: Tensor
    places: slice


def summed(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, H] of slots [T, K, H]: their sum in increasing k in at least fp32 (C1), as ``dtype``."""
    total = slots[:, 0].to(wide(slots.dtype))
    for k in range(1, slots.shape[1]):
        total = total + slots[:, k]
    return total.to(dtype)


def portions(ranks: int, top_k: int) -> list[range]:
    """Ranks whose rows are added up at a time, in at most K portions: each has K places for a row, mostly empty."""
    size = -(-ranks // top_k)
    return [range(first, min(first + size, ranks)) for first in range(0, ranks, size)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Each rank has its own tokens. A token goes once to each rank that has any of its experts.

    Rows and slots are in the order of (rank, token, k), on both sides. Where sizes are bounds, rows and slots beyond
    those that there are fill them up: they name token T and slot T K, are zeros, and are empty at their expert (R7).

    Attributes:
        wire: to the other ranks.
        number: of the call, among those of the group.
        shape: (T, K) of this rank's tokens.
        row_tokens: [rows sent] the token of each.
        own_slots: [slots sent] t K + k of each.
        slot_rows: [S] the row, of those received, of each slot received.
        slot_places: [S] k of each slot received.
        ids: [S, 1] experts of the slots received; -1 for those that fill up.
        needs: what gradients any rank needs.
        rows: ([W], [W]) how many rows are sent and received.
        slots: ([W], [W]) how many slots.
        by_rank: whether a rank adds a token's slots before it sends them back, in fp32.
        bounded: whether sizes are bounds.
    """

    wire: Wire
    number: int
    shape: tuple[int, int]
    row_tokens: Tensor
    own_slots: Tensor
    slot_rows: Tensor
    slot_places: Tensor
    ids: Tensor
    needs: Needs
    rows: tuple[list[int], list[int]]
    slots: tuple[list[int], list[int]]
    by_rank: bool
    bounded: bool

    def out(self, rows: Tensor) -> Arriving:
        """[S, H] the rows [T, H] of the slots' tokens; each crosses once to a rank."""
        arriving = self.wire.exchange(self._filled(rows)[self.row_tokens], *self.rows, ROWS)
        return lambda: arriving()[self.slot_rows]

    def back(self, slots: Tensor) -> Arriving:
        """[T, H] sums over each token's slots."""
        return self._back_by_rank(slots) if self.by_rank else self._back_by_slot(slots)

    def _back_by_slot(self, slots: Tensor) -> Arriving:
        """Every slot comes back, and all are added in increasing k: the sum that one device makes."""
        arriving = self.wire.exchange(slots, self.slots[1], self.slots[0], RESULTS)
        return lambda: summed(self._grid(arriving()), slots.dtype)

    def _back_by_rank(self, slots: Tensor) -> Arriving:
        """A rank's slots of a token are added there in increasing k, and ranks here in their order."""
        partial = torch.cat([self._sums(slots, some) for some in portions(self.wire.ranks, self.shape[1])])
        arriving = self.wire.exchange(partial, self.rows[1], self.rows[0], RESULTS)

        def arrived() -> Tensor:
            total = partial.new_zeros(self.shape[0] + 1, slots.shape[1])
            for tokens, own in zip(
                torch.split(self.row_tokens, self.rows[0]), torch.split(arriving(), self.rows[0]), strict=True
            ):
                total[tokens] += own  # a token is there once
            return total[:-1].to(slots.dtype)

        return arrived

    def _sums(self, slots: Tensor, ranks: range) -> Tensor:
        """[rows, H] over the slots of each row that some ranks have sent."""
        (first_row, rows), (first, count) = (
            (sum(sizes[: ranks.start]), sum(sizes[ranks.start : ranks.stop])) for sizes in (self.rows[1], self.slots[1])
        )
        some, top_k = slice(first, first + count), self.shape[1]
        places = (self.slot_rows[some] - first_row) * top_k + self.slot_places[some]
        grid = slots.new_zeros(rows * top_k + 1, slots.shape[1])
        grid[torch.where(self.ids[some, 0] < 0, rows * top_k, places)] = slots[some]
        return summed(grid[:-1].view(rows, top_k, slots.shape[1]), wide(slots.dtype))

    def weights_out(self, weights: Tensor) -> Arriving:
        """[S, 1] the slots' weights, of [T, K]."""
        return self.wire.exchange(self._filled(weights.reshape(-1, 1))[self.own_slots], *self.slots, SLOTS)

    def weights_back(self, weights: Tensor) -> Arriving:
        """[T, K] what slots [S, 1] hold."""
        arriving = self.wire.exchange(weights, self.slots[1], self.slots[0], RESULTS)
        return lambda: self._grid(arriving())[..., 0]

    def own(self, rows: Tensor, weights: Tensor) -> Own | None:
        """The slots between this rank and itself."""
        if self.wire.ranks == 1:
            return None
        rank, (to, of) = self.wire.rank, self.slots
        first, start = sum(to[:rank]), sum(of[:rank])
        sent, top_k = self.own_slots[first : first + to[rank]], self.shape[1]
        own_weights = self._filled(weights.reshape(-1, 1))[sent]
        return Own(self._filled(rows)[sent // top_k], own_weights, slice(start, start + to[rank]))

    def _filled(self, rows: Tensor) -> Tensor:
        """The rows, and where sizes are bounds one of zeros after them."""
        return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]) if self.bounded else rows

    def _grid(self, slots: Tensor) -> Tensor:
        """[T, K, n] of the slots [slots sent, n] that came back; 0 for empty ones."""
        tokens, top_k = self.shape
        grid = slots.new_zeros(tokens * top_k + 1, slots.shape[1])
        grid[self.own_slots] = slots
        return grid[:-1].view(tokens, top_k, slots.shape[1])


@dataclass(frozen=True, eq=False)
class AllReduce:
    """All ranks have the same tokens. Each does the slots of its experts, and others are empty there (R7).

    Attributes:
        wire: to the other ranks.
        number: of the call, among those of the group.
        shape: (T, K).
        ids: [T K, 1] experts, counted from this rank's first; -1 where another rank has them.
        needs: what gradients all ranks need.
        by_rank: whether a rank adds a token's slots before it sends them, in fp32.
    """

    wire: Wire
    number: int
    shape: tuple[int, int]
    ids: Tensor
    needs: Needs
    by_rank: bool

    def out(self, rows: Tensor) -> Arriving:
        """[T K, H] each row K times; nothing is sent."""
        return lambda: rows.repeat_interleave(self.shape[1], dim=0)

    def back(self, slots: Tensor) -> Arriving:
        """[T, H] sums over each token's slots, of all ranks."""
        tokens, top_k = self.shape
        if not self.by_rank:  # of a slot's numbers all but one rank's are 0: their sum is exact
            arriving = self._over_ranks(slots)
            return lambda: summed(arriving().view(tokens, top_k, slots.shape[1]), slots.dtype)
        arriving = self._over_ranks(summed(slots.view(tokens, top_k, slots.shape[1]), wide(slots.dtype)))
        return lambda: arriving().to(slots.dtype)

    def weights_out(self, weights: Tensor) -> Arriving:
        """[T K, 1] all weights; nothing is sent."""
        return lambda: weights.reshape(-1, 1)

    def weights_back(self, weights: Tensor) -> Arriving:
        """[T, K] each slot's, from the rank that did it."""
        arriving = self._over_ranks(weights)
        return lambda: arriving().view(self.shape)

    def own(self, _rows: Tensor, _weights: Tensor) -> None:
        """All tokens are here: nothing is waited for."""

    def _over_ranks(self, rows: Tensor) -> Arriving:
        """The sum over ranks in their order: each rank adds a part of the rows, and gives all of them its sums."""
        wire, count = self.wire, rows.shape[0]
        size = -(-count // wire.ranks)
        parts = [max(0, min(size, count - rank * size)) for rank in range(wire.ranks)]
        mine = parts[wire.rank]
        arriving = wire.exchange(rows, parts, [mine] * wire.ranks, RESULTS)

        def arrived() -> Tensor:
            received = arriving().view(wire.ranks, mine, rows.shape[1])
            total = received[0]
            for rank in range(1, wire.ranks):
                total = total + received[rank]
            everywhere = total.repeat(wire.ranks, 1)
            return wire.exchange(everywhere, [mine] * wire.ranks, parts, RESULTS)().view(rows.shape)

        return arrived
