"""Judges executors whose experts are spread over several processes, against the specification of one device.

    pytest --pyargs moe_ref.conformance.parallel_suite --executor mine --ranks 4

Each process runs the executor on its experts inside `executors.parallel.ExpertParallel`, on a CPU, by gloo.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.conformance import profiles
from moe_ref.conformance.parallel.judging import (
    DISPATCHES,
    LAWS,
    check_parallel,
    check_parallel_law,
    check_parallel_repeatable,
    problems_of_ranks,
    splits,
)
from moe_ref.conformance.parallel.split import Split
from moe_ref.conformance.problems.declared import fitted, undeclared
from moe_ref.conformance.problems.pinned import GPT_OSS
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig

if TYPE_CHECKING:
    from moe_ref.conformance.parallel.cluster import Cluster
    from moe_ref.conformance.reporting.judge import Judge

PROFILE = profiles.current()
FEWER = settings(PROFILE, max_examples=max(2, PROFILE.max_examples // 3))

SIGMOID = MoEConfig(3, scoring="sigmoid", renormalize=True)
SMALL = Problem(9, 5, 32, 32, MoEConfig(2), "bfloat16", gate_up_bias=True, down_bias=True)
PINNED = {
    "no tokens at all": (replace(SMALL, tokens=0), (0,)),
    "a rank without tokens": (SMALL, (4, 4)),
    "all tokens on one rank": (SMALL, (0, 0, 9)),
    "fewer experts than ranks": (replace(SMALL, experts=2), (3, 6, 6)),
    "one expert": (replace(SMALL, experts=1, config=MoEConfig(1)), (2,)),
    "every expert of every token": (replace(SMALL, experts=4, config=MoEConfig(4)), (5,)),
    "an expert that nobody chooses": (replace(SMALL, tokens=2, experts=7), (1, 1)),
    "empty slots": (replace(SMALL, entry="experts", empty_slots=True), (3, 8)),
    "broken rows": (replace(SMALL, experts=9, broken_logits=1, broken_x=1), (3, 4)),
    "gpt-oss": (replace(SMALL, tokens=33, experts=9, config=GPT_OSS), (8, 9, 30)),
    "adapters": (replace(SMALL, config=SIGMOID, gate_up_rank=3, down_rank=2), (5, 6)),
    "groups and a bias": (
        replace(
            SMALL,
            experts=8,
            config=MoEConfig(2, scoring="sigmoid", num_groups=4, topk_groups=2),
            selection_bias="small",
        ),
        (4,),
    ),
    "scales": (replace(SMALL, expert_scale=True), (2, 7)),
    "weights on the input": (replace(SMALL, config=MoEConfig(2, scale_input=True)), (4, 5)),
    "a norm": (replace(SMALL, post_expert_norm=True), (4, 5)),
    "frozen projections": (replace(SMALL, frozen=frozenset({"gate_up_proj", "down_proj"})), (4,)),
    "frozen but for a bias": (
        replace(SMALL, frozen=frozenset({"x", "router_logits", "gate_up_proj", "down_proj", "gate_up_proj_bias"})),
        (4,),
    ),
    "nf4, nested for all": (replace(SMALL, quant_type="nf4", nested="one"), (4,)),
    "fp4, nested for each": (replace(SMALL, quant_type="fp4", nested="per expert", experts=7), (4, 4)),
    "mxfp4": (replace(SMALL, quant_type="mxfp4", weights_layout="transposed"), (2, 4)),
}
LAW = Problem(11, 5, 16, 16, MoEConfig(3), gate_up_bias=True, down_bias=True)
WAYS = [(dispatch, returns) for dispatch in DISPATCHES for returns in ("slot", "rank")]

__all__ = ["test_drawn_splits", "test_laws_of_ranks", "test_pinned_splits", "test_splits_are_repeatable"]


@FEWER
@given(data=st.data())
def test_drawn_splits(judge: Judge, cluster: Cluster, data: st.DataObject) -> None:
    """Any split over ranks gives what one device must give, outputs and all gradients (R7, C1, D1, D2, D3, T2)."""
    problem = data.draw(problems_of_ranks(judge.executor), label="problem")
    empty_slots = judge.executor.capabilities.empty_slots
    split = data.draw(splits(cluster.ranks, problem.tokens, empty_slots), label="split")
    judge(check_parallel, cluster, judge.name, problem, split)


@pytest.mark.parametrize(("dispatch", "returns"), WAYS)
@pytest.mark.parametrize("case", PINNED)
def test_pinned_splits(judge: Judge, cluster: Cluster, case: str, dispatch: str, returns: str) -> None:
    """Ranks without tokens or experts, and every form of weights (E3, E6, E8, C3, R3, R4, R9, Q5, M1)."""
    problem, cuts = PINNED[case]
    problem = _declared(judge, problem, dispatch)
    judge(check_parallel, cluster, judge.name, problem, Split(cuts[: cluster.ranks - 1], dispatch, returns))


@pytest.mark.parametrize(("dispatch", "returns"), WAYS)
@pytest.mark.parametrize("law", LAWS)
def test_laws_of_ranks(judge: Judge, cluster: Cluster, law: str, dispatch: str, returns: str) -> None:
    """Where tokens are, and how many ranks there are, changes nothing (C1, C2, D1)."""
    able = judge.executor.capabilities
    problem = LAW if "dense" in able.weights else replace(LAW, hidden=32, intermediate=32, quant_type=min(able.weights))
    problem = _declared(judge, problem, dispatch)
    cuts = (3, 3, 7)[: max(0, cluster.ranks - 2)]
    judge(check_parallel_law, cluster, judge.name, problem, Split(cuts, dispatch, returns), law)


@pytest.mark.parametrize(("dispatch", "returns"), WAYS)
def test_splits_are_repeatable(judge: Judge, cluster: Cluster, dispatch: str, returns: str) -> None:
    """C1: two runs on the same ranks have the same bits."""
    able = judge.executor.capabilities
    problem = replace(SMALL, tokens=33, experts=9, quant_type="" if "dense" in able.weights else min(able.weights))
    problem = _declared(judge, problem, dispatch)
    cuts = (8, 9, 30)[: cluster.ranks - 1]
    judge(check_parallel_repeatable, cluster, judge.name, problem, Split(cuts, dispatch, returns))


def _declared(judge: Judge, problem: Problem, dispatch: str) -> Problem:
    """The problem in a form that the executor declares; skips if there is none."""
    able = judge.executor.capabilities
    problem = fitted(problem, able)
    lacking = undeclared(problem, able)
    if dispatch == "all_reduce" and not able.empty_slots:  # where experts of other ranks are empty slots
        lacking = lacking or "empty slots"
    if lacking:
        pytest.skip(f"{judge.executor.name} does not declare {lacking}")
    return problem
