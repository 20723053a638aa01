"""How tokens come to experts and results come back: two pairs of adjoint operations for each way.

A *slot* is a place k of a token. `out` takes tokens to slots, `back` adds slots to tokens; the gradient of either is
the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from executors.parallel.waiting import Wire

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

    def out(self, rows: Tensor) -> Tensor:
        """[S, H] the rows [T, H] of the slots' tokens."""

    def back(self, slots: Tensor) -> Tensor:
        """[T, H] sums over each token's slots, in at least fp32, rounded once to the slots' dtype."""

    def weights_out(self, weights: Tensor) -> Tensor:
        """[S, 1] the slots' weights, of [T, K]."""

    def weights_back(self, weights: Tensor) -> Tensor:
        """[T, K] what slots [S, 1] hold; 0 for empty slots."""


def summed(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, H] of slots [T, K, H]: their sum in increasing k in at least fp32 (C1), as ``dtype``."""
    total = slots[:, 0].to(wide(slots.dtype))
    for k in range(1, slots.shape[1]):
        total = total + slots[:, k]
    return total.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Each rank has its own tokens. A token goes once to each rank that has any of its experts.

    Rows and slots are in the order of (rank, token, k), on both sides.

    Attributes:
        wire: to the other ranks.
        number: of the call, among those of the group.
        shape: (T, K) of this rank's tokens.
        row_tokens: [rows sent] the token of each.
        own_slots: [slots sent] t K + k of each.
        slot_rows: [S] the row, of those received, of each slot received.
        slot_places: [S] k of each slot received.
        ids: [S, 1] experts of the slots received.
        needs: what gradients any rank needs.
        rows: ([W], [W]) how many rows are sent and received.
        slots: ([W], [W]) how many slots.
        by_rank: whether a rank adds a token's slots before it sends them back, in fp32.
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

    def out(self, rows: Tensor) -> Tensor:
        """[S, H] the rows [T, H] of the slots' tokens; each crosses once to a rank."""
        received = self.wire.exchange(rows[self.row_tokens], *self.rows, ROWS)
        return received[self.slot_rows]

    def back(self, slots: Tensor) -> Tensor:
        """[T, H] sums over each token's slots."""
        return self._back_by_rank(slots) if self.by_rank else self._back_by_slot(slots)

    def _back_by_slot(self, slots: Tensor) -> Tensor:
        """Every slot comes back, and all are added in increasing k: the sum that one device makes."""
        received = self.wire.exchange(slots, self.slots[1], self.slots[0], RESULTS)
        tokens, top_k = self.shape
        grid = received.new_zeros(tokens * top_k, slots.shape[1])
        grid[self.own_slots] = received
        return summed(grid.view(tokens, top_k, slots.shape[1]), slots.dtype)

    def _back_by_rank(self, slots: Tensor) -> Tensor:
        """A rank's slots of a token are added there in increasing k, and ranks here in their order."""
        count, top_k = sum(self.rows[1]), self.shape[1]
        grid = slots.new_zeros(count * top_k, slots.shape[1])
        grid[self.slot_rows * top_k + self.slot_places] = slots
        partial = summed(grid.view(count, top_k, slots.shape[1]), wide(slots.dtype))
        received = self.wire.exchange(partial, self.rows[1], self.rows[0], RESULTS)
        total = partial.new_zeros(self.shape[0], slots.shape[1])
        for tokens, own in zip(
            torch.split(self.row_tokens, self.rows[0]), torch.split(received, self.rows[0]), strict=True
        ):
            total[tokens] += own  # a token is there once
        return total.to(slots.dtype)

    def weights_out(self, weights: Tensor) -> Tensor:
        """[S, 1] the slots' weights, of [T, K]."""
        return self.wire.exchange(weights.reshape(-1, 1)[self.own_slots], *self.slots, SLOTS)

    def weights_back(self, weights: Tensor) -> Tensor:
        """[T, K] what slots [S, 1] hold."""
        received = self.wire.exchange(weights, self.slots[1], self.slots[0], RESULTS)
        grid = received.new_zeros(self.shape[0] * self.shape[1], 1)
        grid[self.own_slots] = received
        return grid.view(self.shape)


@dataclass(frozen=True, eq=False)
class AllReduce:
    """All ranks have the same tokens. Each does the slots of its experts, and others are empty there (R7).

    Attributes:
        wire: to the other ranks.
        number: of the call, among those of the group.
        shape: (T, K).
        ids: [T K, 1] experts, counted from this rank's first; -1 where another rank has them.
        needs: what gradients any rank needs.
        by_rank: whether a rank adds a token's slots before it sends them, in fp32.
    """

    wire: Wire
    number: int
    shape: tuple[int, int]
    ids: Tensor
    needs: Needs
    by_rank: bool

    def out(self, rows: Tensor) -> Tensor:
        """[T K, H] each row K times; nothing is sent."""
        return rows.repeat_interleave(self.shape[1], dim=0)

    def back(self, slots: Tensor) -> Tensor:
        """[T, H] sums over each token's slots, of all ranks."""
        tokens, top_k = self.shape
        if not self.by_rank:  # of a slot's numbers all but one rank's are 0: their sum is exact
            return summed(self._over_ranks(slots).view(tokens, top_k, slots.shape[1]), slots.dtype)
        own = summed(slots.view(tokens, top_k, slots.shape[1]), wide(slots.dtype))
        return self._over_ranks(own).to(slots.dtype)

    def weights_out(self, weights: Tensor) -> Tensor:
        """[T K, 1] all weights; nothing is sent."""
        return weights.reshape(-1, 1)

    def weights_back(self, weights: Tensor) -> Tensor:
        """[T, K] each slot's, from the rank that did it."""
        return self._over_ranks(weights).view(self.shape)

    def _over_ranks(self, rows: Tensor) -> Tensor:
        """The sum over ranks in their order: each rank adds a part of the rows, and gives all of them its sums."""
        wire, count = self.wire, rows.shape[0]
        size = -(-count // wire.ranks)
        parts = [max(0, min(size, count - rank * size)) for rank in range(wire.ranks)]
        mine = parts[wire.rank]
        received = wire.exchange(rows, parts, [mine] * wire.ranks, RESULTS).view(wire.ranks, mine, rows.shape[1])
        total = received[0]
        for rank in range(1, wire.ranks):
            total = total + received[rank]
        everywhere = total.repeat(wire.ranks, 1)
        return wire.exchange(everywhere, [mine] * wire.ranks, parts, RESULTS).view(rows.shape)
