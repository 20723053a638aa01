"""Calls under way while the caller does other work, own tokens before others', and sizes with bounds."""

import pytest

import parallel_started as started
from moe_ref.conformance.parallel.cluster import Cluster


@pytest.mark.parametrize("entry", ["layer", "experts"])
@pytest.mark.parametrize("returns", ["slot", "rank"])
def test_a_bound_changes_no_bit(cluster: Cluster, returns: str, entry: str) -> None:
    assert cluster.run(started.bounded, returns, entry) == [[]] * 4


def test_more_than_a_bound_is_told_to_all(cluster: Cluster) -> None:
    expected = ["rank 1 sends 16 slots to rank 1: must be at most max_slots=9", "(4, 16)"]
    assert cluster.run(started.beyond_a_bound, ranks=2) == [expected] * 2


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_reduce"])
def test_two_calls_under_way(cluster: Cluster, dispatch: str) -> None:
    assert cluster.run(started.under_way, dispatch, ranks=3) == [[]] * 3


def test_gradients_are_those_of_the_start(cluster: Cluster) -> None:
    assert cluster.run(started.of_other_grad_mode, ranks=2) == [(False, True)] * 2


@pytest.mark.parametrize("max_slots", [None, 8])
def test_own_tokens_do_not_wait(cluster: Cluster, max_slots: int | None) -> None:
    (first, one), (second, other) = cluster.run(started.overlapping, max_slots, ranks=2)
    assert first == ["experts of 8", "arrived", "experts of 0"]  # rank 0: token by token to itself and to rank 1
    assert second == ["experts of 6", "arrived", "experts of 8"]
    assert max(one, other) < 1e-12


def test_own_tokens_wait_where_gradients_would_be_rounded_twice(cluster: Cluster) -> None:
    assert cluster.run(started.overlapping_with_gradients, ranks=2) == [["experts"]] * 2


def test_a_call_that_a_rank_never_waits_for(breaking: Cluster) -> None:
    first, _ = breaking.run(started.never_waited_for, ranks=2, goes_on=False)
    assert first == "rank 1 did not come where results come back within 2 s"
