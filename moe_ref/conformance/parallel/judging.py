"""What the suite demands of an executor whose experts are spread over ranks: what it demands on one device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from moe_ref.conformance.judgement.checks import ConformanceError, applicable, verdicts_of, with_one_choice
from moe_ref.conformance.judgement.faults import Fault
from moe_ref.conformance.judgement.gates import CLAUSES
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.parallel.cluster import Cluster, RanksError
from moe_ref.conformance.parallel.split import Made, Split, joined, made, run_part, within
from moe_ref.conformance.problems.packed import straddles
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems_for

if TYPE_CHECKING:
    from executors import Executor

DISPATCHES = ("all_to_all", "all_reduce")


def check_parallel(
    executor: Executor,
    cluster: Cluster,
    name: str,
    problem: Problem,
    split: Split,
    _device: str = "cpu",
    make: Made = made,
) -> None:
    """Runs a problem on several ranks, and judges outputs and all gradients as those of one device.

    Args:
        executor: that each rank runs on its experts.
        cluster: of at least as many processes as the split has ranks.
        name: by which the processes get the executor.
        problem: on what.
        split: over which ranks.
        make: makes the parallel executor in each process.

    Raises:
        ConformanceError: a clause is broken, ranks that must agree do not, or some rank raises.
    """
    _judged(executor, cluster, name, _alone(executor, problem), split, make)


def _judged(
    executor: Executor, cluster: Cluster, name: str, problem: Problem, split: Split, make: Made = made
) -> dict[str, Any]:
    """The joined results of all ranks, by name, once they are judged."""
    try:
        parts = cluster.run(run_part, name, problem, split, make, ranks=split.ranks)
        results = joined(parts, problem, split)
    except (RanksError, ValueError) as error:
        raise ConformanceError(executor, problem, "the ranks' agreement", f"{split}: {error}") from error
    truth = reference(problem)
    faults = [Fault("D1", f"no gradient for {own} on any rank", own) for own, value in results.items() if value is None]
    judged = verdicts_of({own: value for own, value in results.items() if value is not None}, problem, truth)
    for verdict in judged:
        if verdict.failure:
            clause = "R4" if truth.broken.any() else CLAUSES[verdict.name]
            faults.append(Fault(clause, f"{split}: {verdict.failure}", verdict.name))
    if faults:
        raise ConformanceError(executor, problem, *faults[0], truth.arrays, faults[1:])
    return results


def check_parallel_law(
    executor: Executor,
    cluster: Cluster,
    name: str,
    problem: Problem,
    split: Split,
    law: str,
    _device: str = "cpu",
    make: Made = made,
) -> None:
    """Spreads the same tokens in another way (`LAWS`), which must change nothing.

    The numbers of both ways must lie within the error bars. Where the executor is batch invariant (C2), and slots come
    back, y must have the same bits.

    Raises:
        ConformanceError: they do not.
    """
    problem = _alone(executor, problem)
    first, second = split, LAWS[law](split, cluster.ranks, problem)
    found = [_judged(executor, cluster, name, problem, own, make)["y"] for own in (first, second)]
    exact = executor.capabilities.batch_invariant and split.returns == "slot"
    if exact and found[0].tobytes() != found[1].tobytes():
        raise ConformanceError(executor, problem, f"the law {law}", f"y of {first} and of {second} differ", "y")


def permute_ranks(split: Split, _ranks: int, _problem: Problem) -> Split:
    """Each part of the tokens is on another rank, whose experts are others."""
    return replace(split, order=(*range(1, split.ranks), 0))


def move_token(split: Split, _ranks: int, problem: Problem) -> Split:
    """The first token of each rank but the first goes to the rank before."""
    return replace(split, cuts=tuple(min(cut + 1, problem.tokens) for cut in split.cuts))


def other_ranks(split: Split, ranks: int, problem: Problem) -> Split:
    """As many ranks as there are, or one less, with other cuts."""
    count = ranks if split.ranks < ranks else max(1, ranks - 1)
    cuts = np.random.default_rng(problem.seed).integers(problem.tokens + 1, size=count - 1)
    return replace(split, cuts=tuple(sorted(cuts.tolist())))


LAWS = {law.__name__: law for law in (permute_ranks, move_token, other_ranks)}


def check_parallel_repeatable(
    executor: Executor, cluster: Cluster, name: str, problem: Problem, split: Split, _device: str = "cpu"
) -> None:
    """C1: two runs on the same ranks have the same bits, forward and backward.

    Raises:
        ConformanceError: they have not.
    """
    problem = _alone(executor, problem)
    first, second = (cluster.run(run_part, name, problem, split, ranks=split.ranks) for _ in range(2))
    for rank, (one, other) in enumerate(zip(first, second, strict=True)):
        for own, value in one.items():
            if value is not None and value[0].tobytes() != other[own][0].tobytes():
                message = f"{split}: {own} of rank {rank} differs between two runs"
                raise ConformanceError(executor, problem, "C1", message, own)


def _alone(executor: Executor, problem: Problem) -> Problem:
    """The problem in a form that several ranks take, which leaves them one choice of experts."""
    return with_one_choice(applicable(executor, within(problem)))


@st.composite
def splits(draw: st.DrawFn, ranks: int, tokens: int, empty_slots: bool = True) -> Split:
    """Draws uneven splits over up to so many ranks; some have no tokens, and some make empty slots, if they may."""
    count = draw(st.integers(1, ranks), label="ranks")
    cuts = draw(st.lists(st.integers(0, tokens), min_size=count - 1, max_size=count - 1), label="cuts")
    dispatch = draw(st.sampled_from(DISPATCHES if empty_slots else DISPATCHES[:1]), label="dispatch")
    bounded = empty_slots and dispatch == "all_to_all" and draw(st.booleans(), label="bounded")
    returns = draw(st.sampled_from(["slot", "rank"]), label="returns")
    return Split(tuple(sorted(cuts)), dispatch, returns, bounded=bounded)


def problems_of_ranks(executor: Executor) -> st.SearchStrategy[Any]:
    """Problems within an executor's capabilities whose 4-bit blocks straddle no ranks."""
    return problems_for(executor).filter(lambda problem: not straddles(within(problem)))
