"""Expert parallelism with bugs that the field has had: each must be rejected. Made in the processes of a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import executors
from executors import Capabilities
from executors.native import Native
from executors.parallel import ExpertParallel
from executors.parallel.planning import owners
from executors.parallel.transport import Transport
from executors.parallel.waiting import Arriving
from moe_ref.conformance.parallel.split import Split, options
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.wrapped import Declaring
from moe_ref.types import MoEWeights


@dataclass
class Wrong:
    """A transport around another; what a mutant does not change is the other's."""

    right: Any
    owner: Tensor
    kind: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def back(self, slots: Tensor) -> Arriving:
        arriving = self.right.back(slots)
        return lambda: self._back(arriving())

    def weights_back(self, weights: Tensor) -> Arriving:
        arriving = self.right.weights_back(weights)
        return lambda: self._weights_back(arriving())

    def _back(self, found: Tensor) -> Tensor:
        ranks = self.right.wire.ranks
        if self.kind == "token_lost" and len(self.owner) and len({*self.owner.flatten().tolist()}) < ranks:
            found[-1] = 0  # where some rank has no token's expert
        if self.kind == "double_count":
            counts = torch.nn.functional.one_hot(self.owner, ranks + 1)[..., :ranks].sum(1)
            found[(counts > 1).any(1)] *= 2
        return found

    def _weights_back(self, found: Tensor) -> Tensor:
        if self.kind == "swapped":
            return found.flip(1)
        if self.kind == "local_router":
            return found * (self.owner == self.right.wire.rank)
        return found


@dataclass(frozen=True, eq=False)
class WrongParallel(ExpertParallel):
    kind: str = ""

    def _experts(self, rows: Tensor, weights: Tensor, ids: Tensor, own: MoEWeights) -> Tensor:
        if self.kind == "no_gradient" and own.num_experts == 0:
            own = own.map(Tensor.detach)
        return super()._experts(rows, weights, ids, own)

    def _transport(self, ids: Tensor, experts: Any, call: Any, needs: Any) -> Transport:
        if self.kind == "remainder_dropped":
            whole = experts.ranks * (experts.num_experts // experts.ranks)
            ids = ids.masked_fill(ids >= whole, -1)
        right = super()._transport(ids, experts, call, needs)
        return Wrong(right, owners(ids, experts), self.kind)


def _made(kind: str, name: str, group: Any, split: Split, problem: Problem) -> ExpertParallel:
    return WrongParallel(name, group, kind=kind, **options(split, problem))


def plain(name: str, group: Any, split: Split, problem: Problem) -> ExpertParallel:
    """None: the executor inside is right, and refuses no tokens, empty slots, duplicate ids and ids in int64."""
    able = replace(
        executors.get(name).capabilities,
        empty_batch=False,
        empty_slots=False,
        duplicate_ids=False,
        topk_ids_dtypes=frozenset({"int32"}),
    )
    inner = Declaring("plain", executors.get(name), declared=able)
    return ExpertParallel(inner, group, **options(split, problem))


def token_lost(*given: Any) -> ExpertParallel:
    """The last token is lost where a rank has none."""
    return _made("token_lost", *given)


def swapped(*given: Any) -> ExpertParallel:
    """Gradients of a token's weights come back in another order."""
    return _made("swapped", *given)


def local_router(*given: Any) -> ExpertParallel:
    """The router's gradient is that of this rank's experts alone."""
    return _made("local_router", *given)


def double_count(*given: Any) -> ExpertParallel:
    """A token counts twice where two of its experts share a rank."""
    return _made("double_count", *given)


def remainder_dropped(*given: Any) -> ExpertParallel:
    """Experts beyond a multiple of the ranks are never reached."""
    return _made("remainder_dropped", *given)


def no_gradient(*given: Any) -> ExpertParallel:
    """A rank without experts has no gradients."""
    return _made("no_gradient", *given)


@dataclass(frozen=True)
class Invariant(Native):
    """``native``, which declares batch invariance."""

    name: ClassVar[str] = "invariant"

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, batch_invariant=True)


@dataclass(frozen=True, eq=False)
class RankDependent(ExpertParallel):
    """Whose last bits depend on a token's rank."""

    def _run(self, x: Tensor, prepared: Any) -> Tensor:
        return super()._run(x, prepared) * (1 + 2.3e-16 * (self.wire.rank % 2))


def rank_dependent(_name: str, group: Any, split: Split, problem: Problem) -> ExpertParallel:
    """The last bits depend on where tokens are."""
    return RankDependent(Invariant(), group, **options(split, problem))


MUTANTS = (token_lost, swapped, local_router, double_count, remainder_dropped)
