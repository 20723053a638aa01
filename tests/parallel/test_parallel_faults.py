"""Faults of one rank end in one clear error on every rank, within the timeout, and never in a wrong number."""

import time

import pytest

import parallel_calls as calls
from moe_ref.conformance.parallel.cluster import Cluster, RanksError

RANKS = 3
DIFFERENT = {
    "hidden": "rank 1 has hidden=24, but rank 0 has 16",
    "dtype": "rank 1 has dtype='float64', but rank 0 has 'float32'",
    "config": "rank 1 has config.alpha=1.5, but rank 0 has 1.0",
    "experts": "rank 1 has num_experts=6, but rank 0 has 5",
    "grad": "rank 1 has grad_enabled=False, but rank 0 has True",
}


def said(cluster: Cluster, fault: str, dispatch: str, timeout: float = 30.0, goes_on: bool = True) -> list[str]:
    """What each rank says."""
    with pytest.raises(RanksError) as caught:
        cluster.run(calls.faulty, fault, dispatch, timeout, ranks=RANKS, goes_on=goes_on)
    return ["".join(caught.value.errors.get(rank, "").splitlines()[-1:]) for rank in range(RANKS)]


@pytest.mark.parametrize("fault", DIFFERENT)
def test_what_ranks_pass_differently_is_named(cluster: Cluster, fault: str) -> None:
    dispatch = "all_reduce" if fault in ("hidden", "grad") else "all_to_all"
    for line in said(cluster, fault, dispatch):
        assert line == f"executors.parallel.waiting.RankError: {DIFFERENT[fault]}: must be equal"


def test_other_tokens_are_named_where_all_have_the_same(cluster: Cluster) -> None:
    for line in said(cluster, "tokens", "all_reduce"):
        assert line.endswith("RankError: rank 1 has tokens=7, but rank 0 has 8: must be equal")


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_reduce"])
def test_what_a_rank_refuses_is_told_to_all(cluster: Cluster, dispatch: str) -> None:
    zero, one, two = said(cluster, "refused", dispatch)
    assert one.startswith("ValueError: x.shape=(8, 15): must be")
    assert zero == two
    assert zero.startswith("executors.parallel.waiting.RankError: rank 1 raised ValueError: x.shape=(8, 15): must be")


def test_a_part_of_other_size_is_told_to_all(cluster: Cluster) -> None:
    zero, one, _ = said(cluster, "part", "all_to_all")
    assert one.startswith("ValueError: gate_up_proj.shape=(5, 16, 16): must have 2 experts: of 5 experts on 3 ranks")
    assert zero.startswith("executors.parallel.waiting.RankError: rank 1 raised ValueError: gate_up_proj.shape")


@pytest.mark.parametrize("dispatch", ["all_to_all", pytest.param("all_reduce", marks=pytest.mark.nightly)])
def test_a_rank_that_raises_in_its_experts(cluster: Cluster, dispatch: str) -> None:
    start = time.monotonic()
    zero, one, two = said(cluster, "raises", dispatch, goes_on=False)
    assert time.monotonic() - start < 60
    assert one == "memory"
    assert zero == two == "executors.parallel.waiting.RankError: rank 1 raised RuntimeError: out of memory"


@pytest.mark.parametrize("dispatch", ["all_to_all", pytest.param("all_reduce", marks=pytest.mark.nightly)])
def test_a_rank_that_never_comes(cluster: Cluster, dispatch: str) -> None:
    zero, one, two = said(cluster, "absent", dispatch, timeout=3.0, goes_on=False)
    assert one == ""
    assert zero == two == "executors.parallel.waiting.RankError: rank 1 did not come before a call within 3 s"


def test_wrong_arguments_are_refused_in_one_line(cluster: Cluster) -> None:
    first, _ = cluster.run(calls.wrong_arguments, ranks=2)
    unknown, _ = cluster.run(calls.without_num_experts, ranks=2)
    assert first == [
        "dispatch='all_to_one': must be 'all_to_all' or 'all_reduce'",
        "returns='token': must be 'slot' or 'rank'",
        "timeout=0: must be a number of seconds above 0",
        "num_experts=0: must be an integer of at least 1, or None",
        "mesh_or_group='ranks': must be a process group, a mesh of one dimension, or None",
        "gate_up_proj.shape=(5, 16, 16): must have 4 experts: of 7 experts on 2 ranks, rank 0 has 4",
        "num_experts=0: must be an integer of at least 1",
        "timeout='soon': must be a number of seconds above 0",
        "max_slots=0: must be an integer of at least 1, or None",
        "overlap=True: must be left out for dispatch='all_reduce'",
        "overlap=1: must be True or False",
    ]
    assert unknown == "num_experts=None: must be given to ExpertParallel, since ids do not tell it"


def test_an_answer_that_never_comes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.run(calls.without_num_experts)  # the processes have started
    monkeypatch.setattr(cluster, "limit_s", 2.0)
    with pytest.raises(RanksError) as caught:
        cluster.run(calls.sleeping, ranks=2)
    assert caught.value.errors == {1: "no answer within 2 s"}


def test_a_part_that_is_never_gathered(breaking: Cluster) -> None:
    (zero, one), other = breaking.run(calls.gathered_alone, ranks=2, goes_on=False)
    assert other == ("", "")
    assert zero == "rank 1 did not come where parts are gathered within 2 s"
    assert one.startswith("the group is out of step since rank 1 did not come where parts are gathered")
