"""A call whose tokens are on their way: the caller does other work, and then takes y."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from executors.parallel.autograd import Back, Mark, Out, needing
from executors.parallel.transport import Own, Transport
from executors.parallel.waiting import Arriving
from moe_ref.types import MoEWeights


class Inside(Protocol):
    """What runs a rank's experts."""

    def __call__(self, rows: Tensor, weights: Tensor, ids: Tensor, own: MoEWeights) -> Tensor:
        """[S, H] the results of slots, each with its weight."""


@dataclass
class Started:
    """A call of `ExpertParallel` that has begun: tokens travel while the caller does something else.

        started = executor.start(x, router_logits, local)
        shared = shared_experts(x)
        y = started.wait() + shared

    Every rank takes the same steps in the same order: `compute`, if any does, and `wait`. A rank that never waits
    leaves the others waiting, until their time is up. Several calls may be under way, if each rank begins and ends them
    in the same order.
    """

    transport: Transport
    rows: Tensor
    slot_weights: Tensor
    weights: MoEWeights
    shape: torch.Size
    inside: Inside
    overlap: bool
    coming: tuple[Arriving, Arriving] | None = field(init=False)
    grad_enabled: bool = field(init=False)
    results: tuple[Tensor, Arriving] | None = field(init=False, default=None)
    y: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.grad_enabled = torch.is_grad_enabled()
        with torch.no_grad():
            self.coming = self.transport.out(self.rows), self.transport.weights_out(self.slot_weights)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self) -> Started:
        """Waits for tokens, runs this rank's experts, and sends their results on their way back.

        Raises:
            RankError: another rank raised or did not come.
        """
        if self.results is None:
            with torch.set_grad_enabled(self.grad_enabled):
                self.results = self._computed()
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wait(self) -> Tensor:
        """Y of this rank's tokens, of x's shape, dtype and device. It computes first, unless that was done.

        Raises:
            RankError: another rank raised or did not come.
        """
        if self.y is None:
            slots, arriving = self._results()
            with torch.set_grad_enabled(self.grad_enabled), self.transport.wire.together():
                y: Tensor = Back.apply(slots, self.transport, arriving)  # type: ignore[no-untyped-call]
                self.y = y.view(self.shape)
        return self.y

    def _results(self) -> tuple[Tensor, Arriving]:
        self.compute()
        assert self.results is not None
        return self.results

    def _computed(self) -> tuple[Tensor, Arriving]:
        """The results of this rank's slots, with their gradient, and what waits for those of its tokens."""
        transport = self.transport
        with transport.wire.together():
            apart = self.overlap and not transport.needs.any  # else gradients of parameters would be rounded twice
            own = transport.own(self.rows, self.slot_weights) if apart else None
            slots = self._all() if own is None else self._own_first(own)
            slots = needing(slots, transport.needs.any)
        slots = Mark.apply(slots)  # type: ignore[no-untyped-call]
        with transport.wire.together():
            return slots, transport.back(slots.detach())

    def _all(self) -> Tensor:
        """[S, H] all slots at once."""
        rows, weights = Out.apply(self.rows, self.slot_weights, self.transport, *self._taken())  # type: ignore[no-untyped-call]
        return self.inside(rows, weights, self.transport.ids, self.weights)

    def _taken(self) -> tuple[Arriving, Arriving]:
        """What is on its way. It is let go of: rows sent and received would stay until y is there."""
        assert self.coming is not None
        coming, self.coming = self.coming, None
        return coming

    def _own_first(self, own: Own) -> Tensor:
        """[S, H] those of this rank's own tokens, while the others arrive, and then those."""
        ids = self.transport.ids
        mine = self.inside(own.rows, own.weights, ids[own.places], self.weights)
        others = ids.clone()
        others[own.places] = -1
        rows, weights = (arriving() for arriving in self._taken())
        slots = self.inside(rows, weights, others, self.weights)
        slots[own.places] = mine
        return slots
