"""Calls under way, and sizes with bounds, as ranks of a cluster run them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from executors import parallel
from executors.native import Native
from moe_ref.types import MoEConfig, MoEWeights
from parallel_calls import PROBLEM, layer, own_rows

EXACT = replace(PROBLEM, dtype="float64", experts=7, config=MoEConfig(3))
UNEVEN = {1: 0, 2: 3}  # tokens of some ranks; the others have all


def _mine(group: Any, value: Tensor) -> Tensor:
    rank = dist.get_rank(group)
    return own_rows(group, value)[: UNEVEN.get(rank, len(value))]


def bounded(group: Any, returns: str, entry: str) -> list[str]:
    """Names of outputs and gradients whose bits are others with a bound than with sizes that are told."""
    found = []
    for max_slots in (None, 3 * 8):
        inputs = layer(replace(EXACT, entry=entry))
        part, _ = parallel.shard(inputs.weights, group)
        executor = parallel.ExpertParallel("native", group, "all_to_all", returns, 7, max_slots=max_slots)  # type: ignore[arg-type]
        if entry == "experts":
            ids, own_weights = _mine(group, inputs.topk_ids), _mine(group, inputs.topk_weights)  # type: ignore[arg-type]
            y = executor.experts(_mine(group, inputs.x), topk_ids=ids, topk_weights=own_weights, weights=part)
        else:
            y = executor(_mine(group, inputs.x), _mine(group, inputs.router_logits), part)  # type: ignore[arg-type]
        y.backward(_mine(group, inputs.dy))
        grads = {name: leaf.grad for name, leaf in inputs.tensors().items() if leaf.grad is not None}
        found.append({"y": y.detach(), **grads})
    told, bound = found
    return [name for name, value in told.items() if not torch.equal(value, bound[name])] + [*(told.keys() ^ bound)]


def beyond_a_bound(group: Any) -> list[str]:
    """What is said where a rank sends too much, and of a call after it."""
    inputs = layer(replace(PROBLEM, entry="experts", config=MoEConfig(2)))
    part, _ = parallel.shard(inputs.weights, group)
    executor = parallel.ExpertParallel("native", group, num_experts=5, max_slots=9, timeout=20.0)
    said = []
    for expert in (4, 1):  # of the last rank, and of the first
        wrong = dist.get_rank(group) == 1
        ids = torch.tensor([[expert, expert] if wrong else [0, 4]] * 8, dtype=torch.int32)
        ids = ids if expert == 4 else ids[:4]
        x, weights = inputs.x[: len(ids)], torch.full(ids.shape, 0.5)
        try:
            y = executor.experts(x, topk_ids=ids, topk_weights=weights, weights=part)
            said.append(str(tuple(y.shape)))
        except parallel.RankError as error:
            said.append(str(error))
    return said


def under_way(group: Any, dispatch: str) -> list[str]:
    """What differs between calls in turn and two calls that are under way together."""
    found = []
    for together in (False, True):
        inputs = layer(EXACT)
        part, _ = parallel.shard(inputs.weights, group)
        executor = parallel.ExpertParallel("native", group, dispatch)  # type: ignore[arg-type]
        halves = [(inputs.x[rows], inputs.router_logits[rows]) for rows in (slice(0, 5), slice(5, 8))]  # type: ignore[index]
        if together:
            first, second = (executor.start(*half, part) for half in halves)
            second.compute()
            outputs = [first.compute().wait(), second.wait()]
            assert first.wait() is outputs[0]
        else:
            outputs = [executor(*half, part) for half in halves]
        y = torch.cat(outputs)
        y.backward(inputs.dy)
        grads = {name: leaf.grad for name, leaf in inputs.tensors().items() if leaf.grad is not None}
        found.append({"y": y.detach(), **grads})
    return [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]


def of_other_grad_mode(group: Any) -> tuple[bool, bool]:
    """Whether y needs a gradient as its call began."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    executor = parallel.ExpertParallel("native", group)
    with torch.no_grad():
        inference = executor.start(inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    training = executor.start(inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    first = inference.wait().requires_grad
    with torch.no_grad():
        return first, training.wait().requires_grad


@dataclass(frozen=True)
class Noting(Native):
    """``native``, which notes its calls."""

    name: ClassVar[str] = "noting"
    notes: list[str] = field(default_factory=list)

    def experts(self, x: Tensor, **arguments: Any) -> Tensor:
        self.notes.append(f"experts of {int((arguments['topk_ids'] >= 0).sum())}")
        return super().experts(x, **arguments)


def overlapping(group: Any, max_slots: int | None) -> tuple[list[str], float]:
    """What happens in which order, and how far y is from that of a call that waits first."""
    inputs = layer(replace(EXACT, entry="experts", config=MoEConfig(2)))
    part: MoEWeights = parallel.shard(inputs.weights, group)[0]
    rank = dist.get_rank(group)
    ids = torch.tensor([[0, 6]] * 8 if rank == 0 else [[5, 6]] * 3, dtype=torch.int32)
    x, weights = inputs.x[: len(ids)], torch.full(ids.shape, 0.25, dtype=torch.float64)
    inner = Noting()
    with torch.no_grad():
        given = {"topk_ids": ids, "topk_weights": weights, "weights": part}
        plain = parallel.ExpertParallel("native", group, num_experts=7).experts(x, **given)  # type: ignore[arg-type]
        executor = parallel.ExpertParallel(inner, group, num_experts=7, overlap=True, max_slots=max_slots)
        started = executor.start_experts(x, **given)  # type: ignore[arg-type]
        rows, own_weights = started.coming

        def arrived() -> Tensor:
            inner.notes.append("arrived")
            return rows()

        started.coming = arrived, own_weights
        y = started.wait()
    return inner.notes, float((y - plain).abs().max())


def overlapping_with_gradients(group: Any) -> list[str]:
    """What the executor inside does where gradients are needed."""
    inputs = layer(EXACT)
    part, _ = parallel.shard(inputs.weights, group)
    inner = Noting()
    parallel.ExpertParallel(inner, group, overlap=True)(inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    return [note.split()[0] for note in inner.notes]


def never_waited_for(group: Any) -> str:
    """What a rank says that waits for one that does not."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    executor = parallel.ExpertParallel("native", group, timeout=2.0)
    started = executor.start(inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    if dist.get_rank(group) == 1:
        return ""
    try:
        started.wait()
    except parallel.RankError as error:
        return str(error)
    return "nothing"
