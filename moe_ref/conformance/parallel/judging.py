"""What the suite demands of an executor whose experts are spread over ranks: what it demands on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
    problem = _alone(executor, problem)
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
def splits(draw: st.DrawFn, ranks: int, tokens: int, dispatches: Sequence[str] = DISPATCHES) -> Split:
    """Draws uneven splits over up to so many ranks; some have no tokens."""
    count = draw(st.integers(1, ranks), label="ranks")
    cuts = draw(st.lists(st.integers(0, tokens), min_size=count - 1, max_size=count - 1), label="cuts")
    dispatch = draw(st.sampled_from(dispatches), label="dispatch")
    return Split(tuple(sorted(cuts)), dispatch, draw(st.sampled_from(["slot", "rank"]), label="returns"))


def problems_of_ranks(executor: Executor) -> st.SearchStrategy[Any]:
    """Problems within an executor's capabilities whose 4-bit blocks straddle no ranks."""
    return problems_for(executor).filter(lambda problem: not straddles(within(problem)))
