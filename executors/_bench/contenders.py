"""Who takes part in the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import executors
from executors._bench.case import FORWARD
from executors._bench.layers import BenchLayer
from executors._bench.routing import Batch
from executors._bench.variants import executor_of, expanded, refusal_of, weights_of


def no_refusal(tokens: int, backward: bool) -> str:
    """Takes every size."""
    return ""


@dataclass(frozen=True, eq=False)
class Contender:
    """An executor, or a peer, on one layer.

    Attributes:
        name: in tables.
        ours: whether it is an executor of this project or of a plug-in, which must be right.
        call: the experts' forward pass, for a batch; None where it cannot run at all.
        reason: why it cannot run at all, or "".
        backward: whether it has gradients.
        refusal: why it is left out for so many tokens, with or without backward, or "".
        interpreted: whether its kernels are interpreted, so that its times are no measurement.
        prepare: called once before its first case; for a peer that tunes itself on its first call.
        settle: called after each timed call of any contender, outside its time; for a peer whose threads stay busy.
    """

    name: str
    ours: bool
    call: Callable[[Batch], Tensor] | None = None
    reason: str = ""
    backward: bool = True
    refusal: Callable[[int, bool], str] = no_refusal
    interpreted: bool = False
    prepare: Callable[[], None] | None = None
    settle: Callable[[], None] | None = None

    def why_not(self, tokens: int, backward: bool) -> str:
        """Why it is left out of a case, or ""."""
        if self.reason:
            return self.reason
        if backward and not self.backward:
            return "forward only"
        return self.refusal(tokens, backward)


def our_contenders(
    layer: BenchLayer, batch: Batch, names: list[str], admit_interpreted: bool = False
) -> list[Contender]:
    """The executors of those names, usable or with the reason why not; in 4 bits some in several ways.

    Args:
        layer: the layer.
        batch: an input.
        names: of the executors, and of ways of theirs (`executors._bench.variants`).
        admit_interpreted: whether one whose kernels are interpreted takes part.
    """
    reasons = {row.name: row.reason for row in executors.explain(batch.x, layer.weights())}
    found = []
    for name in expanded(names, layer, admit_interpreted):
        reason = reasons[name] if name in reasons else refusal_of(name, batch.x, layer)
        found.append(Contender(name, True, reason=reason) if reason else _ours(layer, name, admit_interpreted))
    return found


def _ours(layer: BenchLayer, name: str, admit_interpreted: bool) -> Contender:
    executor = executor_of(name)

    def call(batch: Batch) -> Tensor:
        return executor.experts(
            batch.x, topk_ids=batch.topk_ids, topk_weights=batch.topk_weights, weights=weights_of(name, layer)
        )

    able = executor.capabilities
    refused = able.interpreted and not admit_interpreted
    reason = "interpreted: its times mean nothing" if refused else ""
    return Contender(name, True, call, reason, able.backward, interpreted=able.interpreted)


def action_of(call: Callable[[Batch], Tensor], given: Batch, direction: str) -> Callable[[], None]:
    """The call that is timed."""

    def forward() -> None:
        with torch.no_grad():
            call(given)

    def forward_backward() -> None:
        torch.autograd.backward(call(given), given.dy)

    return forward if direction == FORWARD else forward_backward
