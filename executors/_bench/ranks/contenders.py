"""Who takes part: `ExpertParallel` around executors, transformers' expert parallelism, and one process alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch.distributed as dist
from torch import Tensor

import executors
from executors import parallel
from executors._bench.contenders import action_of
from executors._bench.layers import BenchLayer
from executors._bench.peers.transformers import PREFIX, experts_module, peers_version
from executors._bench.ranks.parts import Part
from executors._bench.routing import Batch
from executors.parallel.groups import group_of

GROUPED = "grouped_mm"  # of transformers' experts functions
OVERLAP = "with overlap"  # the only way without gradients
INTERPRETED = "interpreted: its times mean nothing"

Tokens = Literal["own", "shared", "alone"]
OWN: Final = "own"
SHARED: Final = "shared"
ALONE: Final = "alone"
Call = Callable[[Batch], Tensor]


@dataclass(frozen=True, eq=False)
class RankContender:
    """A way to run the layer.

    Attributes:
        function: an executor, or "hf:NAME" of transformers' experts functions.
        how: in tables: what travels, or how many threads.
        ours: whether it is an executor.
        tokens: "own": each rank has a part of them. "shared": all ranks have all. "alone": the first rank has all, and
            all experts, and the others wait.
        call: the experts' forward pass on this rank; None where it only waits.
        reason: why it does not run, or "".
        threads: of the first rank.
        backward: whether it has gradients.
    """

    function: str
    how: str
    ours: bool
    tokens: Tokens
    call: Call | None = None
    reason: str = ""
    threads: int = 1
    backward: bool = True

    @property
    def name(self) -> str:
        """In a row."""
        return f"{self.function} {self.how}"

    def why_not(self, backward: bool) -> str:
        """Why it is left out of a case, or ""."""
        return self.reason or ("forward only" if backward and not self.backward else "")

    def action(self, batch: Batch, direction: str) -> Callable[[], None]:
        """The call that is timed."""
        return (lambda: None) if self.call is None else action_of(self.call, batch, direction)


def thread_counts(ranks: int) -> list[int]:
    """Of one process: one, as each rank has, and as many as all ranks together."""
    return list(dict.fromkeys((1, ranks)))


def one_process(threads: int) -> str:
    """How one process is named."""
    return f"one, {threads} thread{'s' * (threads > 1)}"


def our_contenders(part: Part, names: list[str], batch: Batch) -> list[RankContender]:
    """Each executor over the ranks in all ways, and in one process with all experts."""
    reasons: list[Any] = [None]
    if part.whole is not None:
        rows = executors.explain(batch.x, part.whole.weights())
        reasons = [{row.name: row.reason for row in rows}]
    dist.broadcast_object_list(reasons)
    found = []
    for name in names:
        reason = reasons[0][name]
        if not reason and executors.get(name).capabilities.interpreted:
            reason = INTERPRETED
        found += [_left_out(name, True, reason)] if reason else _ways(part, name)
    return found


def _left_out(function: str, ours: bool, reason: str) -> RankContender:
    """One row that says why a function runs in no way."""
    return RankContender(function, "all ways", ours, ALONE, reason=reason)


def _ways(part: Part, name: str) -> list[RankContender]:
    inner = executors.get(name)
    backward = inner.capabilities.backward
    count, found = part.experts.num_experts, []
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("all_to_all slot", {}),
        ("all_to_all rank", {"returns": "rank"}),
        (OVERLAP, {"overlap": True}),
        ("all_reduce slot", {"dispatch": "all_reduce"}),
        ("all_reduce rank", {"dispatch": "all_reduce", "returns": "rank"}),
    )
    for how, options in ways:
        tokens: Tokens = SHARED if "dispatch" in options else OWN
        call = _call(parallel.ExpertParallel(inner, num_experts=count, **options), part.local)
        found.append(RankContender(name, how, True, tokens, call, backward=backward))
    for threads in thread_counts(part.experts.ranks):
        alone = None if part.whole is None else _call(inner, part.whole)
        found.append(RankContender(name, one_process(threads), True, ALONE, alone, "", threads, backward))
    return found


def _call(executor: Any, layer: BenchLayer) -> Call:
    def call(batch: Batch) -> Tensor:
        y: Tensor = executor.experts(
            batch.x, topk_ids=batch.topk_ids, topk_weights=batch.topk_weights, weights=layer.weights()
        )
        return y

    return call


def their_contenders(part: Part) -> list[RankContender]:
    """transformers' expert parallelism around its own grouped_mm; none in 4 bits, or where it is not installed."""
    if peers_version() is None or part.local.frozen:
        return []
    name = PREFIX + GROUPED
    if len(set(part.counts())) > 1:
        return [_left_out(name, False, f"E={part.shape.experts}: must be a multiple of {part.experts.ranks} ranks")]
    try:
        calls = _implementations(part.local)
    except (ImportError, AttributeError) as error:
        return [_left_out(name, False, f"not in this transformers: {' '.join(str(error).split())}")]
    ways: tuple[tuple[str, Tokens], ...] = (("all_to_all", OWN), ("all_reduce", SHARED))
    return [RankContender(name, how, False, tokens, calls[how]) for how, tokens in ways]


def _implementations(layer: BenchLayer) -> dict[str, Call]:
    """As `DistributedConfig.ep_implementation` makes them, on a module that has this rank's experts."""
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP

    module = experts_module(layer, GROUPED)
    module._is_expert_parallel = True
    alone, _ = dist.new_subgroups(1)  # type: ignore[no-untyped-call]
    every, single = (DeviceMesh.from_group(group, "cpu") for group in (group_of(None), alone))
    made = {"all_to_all": AllToAllEP(module, every, single), "all_reduce": AllReduceEP(module, every, every)}

    def call_of(implementation: Any) -> Call:
        return lambda batch: implementation(batch.x, batch.topk_ids, batch.topk_weights)

    return {how: call_of(implementation) for how, implementation in made.items()}
