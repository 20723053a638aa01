"""Expert parallelism used oddly: ranks out of step hear of it, and what is odd but right stays right."""

from dataclasses import replace

import pytest
import torch.distributed as dist

import executors
import parallel_attacks as attacks
from executors.parallel import waiting
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.parallel.cluster import Cluster, RanksError
from moe_ref.conformance.parallel.judging import check_parallel
from moe_ref.conformance.parallel.split import Split
from parallel_mutants import no_gradient


@pytest.mark.parametrize("frozen", [frozenset(), frozenset({"x", "router_logits"})], ids=["all", "frozen"])
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_reduce"])
def test_checkpoints_on_a_rank_without_experts(cluster: Cluster, frozen: frozenset[str], dispatch: str) -> None:
    problem = replace(attacks.PROBLEM, frozen=frozen)
    expected = cluster.run(attacks.gradients, problem, False, dispatch)
    assert cluster.run(attacks.gradients, problem, True, dispatch) == expected


def test_a_rank_without_experts_has_gradients_of_all(cluster: Cluster) -> None:
    assert cluster.run(attacks.absent_gradients) == [[]] * 4


def test_a_rank_without_gradients_is_seen(cluster: Cluster) -> None:
    problem, native = replace(attacks.PROBLEM, experts=2), executors.get("native")
    with pytest.raises(ConformanceError, match="gate_up_proj has no gradient on rank 2, but must have one on all"):
        check_parallel(native, cluster, "native", problem, Split((2, 4)), make=no_gradient)


def test_groups_of_a_second_init_have_other_names() -> None:
    names = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        names.append(waiting.Wire(dist.group.WORLD, 1.0).standing.name)
        dist.destroy_process_group()
    assert names[0] != names[1]


def test_a_copy_of_a_model_has_the_same_executor(cluster: Cluster) -> None:
    assert cluster.run(attacks.copied, ranks=1) == [True]


def test_integers_are_numbers(cluster: Cluster) -> None:
    assert cluster.run(attacks.of_integers, ranks=2) == [True, True]


def test_other_options_are_named_and_harm_no_later_call(cluster: Cluster) -> None:
    for dispatch, returns in cluster.run(attacks.of_other_options, ranks=2):
        assert dispatch == "RankError: rank 1 has dispatch='all_reduce', but rank 0 has 'all_to_all': must be equal"
        assert returns == "RankError: rank 1 has returns='rank', but rank 0 has 'slot': must be equal"


@pytest.mark.parametrize("returns", ["slot", "rank"])
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_reduce"])
def test_odd_ids(cluster: Cluster, dispatch: str, returns: str) -> None:
    assert cluster.run(attacks.odd_ids, dispatch, returns) == [True] * 4


@pytest.mark.parametrize("returns", ["slot", "rank"])
def test_the_host_waits_once(cluster: Cluster, returns: str) -> None:
    """For the sizes; where they have a bound, or nothing is sent to experts, a GPU's host waits for nothing."""
    for on_host in (True, False):
        assert cluster.run(attacks.waits, "all_to_all", returns, None, on_host, ranks=2) == [["tolist"]] * 2
    assert cluster.run(attacks.waits, "all_to_all", returns, 16, False, ranks=2) == [[]] * 2
    assert cluster.run(attacks.waits, "all_reduce", returns, None, False, ranks=2) == [[]] * 2


def test_a_wrong_part_is_told_to_all(cluster: Cluster) -> None:
    first, second = cluster.run(attacks.of_wrong_part, ranks=2)
    assert second.startswith("ValueError: gate_up_proj.shape=(5, 16, 16): must have 2 experts")
    assert first == second.replace("ValueError", "RankError: rank 1 raised ValueError", 1)


def test_gradients_of_replicated_dtensors_are_whole(cluster: Cluster) -> None:
    assert cluster.run(attacks.replicated_gradient, ranks=2) == [True, True]


def test_backward_passes_in_another_order(breaking: Cluster) -> None:
    for order, left_out in breaking.run(attacks.in_other_order, ranks=2):
        assert order.startswith("RankError: rank 1 has step='the gradient of results of call ")
        assert left_out.startswith("RankError: rank 1 has step='call ")
        assert "but rank 0 has 'the gradient of results of call " in left_out


def test_an_interrupt_is_told_to_its_own_group_alone(breaking: Cluster) -> None:
    first, second, *others = breaking.run(attacks.in_two_rows)
    assert second[0] == "KeyboardInterrupt: "
    assert first[0] == "RankError: rank 1 raised KeyboardInterrupt"
    after = "RankError: the group is out of step since rank 1 raised KeyboardInterrupt; make another, as by new_group"
    assert first[1] == second[1] == after
    assert others == [["", ""]] * 2


def test_who_gave_up_is_named(breaking: Cluster) -> None:
    first, second = breaking.run(attacks.in_a_hurry)[:2]
    assert second == "RankError: rank 0 gave up before a call"
    assert first.startswith("RankError: rank 1 ")


def test_a_wrong_input_is_named_though_others_do_not_come(breaking: Cluster) -> None:
    assert breaking.run(attacks.refused_alone)[0].startswith("ValueError: x.shape=(8, 15): must be")


class Never:
    """A collective that is never complete."""

    def is_completed(self) -> bool:
        return False


class Gone:
    """A store whose process has ended."""

    def check(self, *_given: object) -> None:
        raise dist.DistNetworkError("Broken pipe")

    set = get = check


def test_a_store_that_is_gone_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_store", Gone)
    monkeypatch.setattr(waiting.Wire, "ranks", 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wire = waiting.Wire(dist.group.WORLD, 1.0)
        monkeypatch.setattr(waiting.Wire, "_key", lambda _self, rank: str(rank))
        with pytest.raises(ArithmeticError, match="own"), wire.together():
            raise ArithmeticError("own")
        with pytest.raises(waiting.RankError, match="before a call failed, and the store of the process group: Broken"):
            wire.wait(Never(), "before a call")
    finally:
        dist.destroy_process_group()


def test_a_rank_that_ends_is_named(breaking: Cluster) -> None:
    with pytest.raises(RanksError) as caught:
        breaking.run(attacks.lost, ranks=2)
    line = caught.value.errors[0].splitlines()[-1]
    assert "RankError: rank 1 did not come before a call: " in line
    assert "within" not in line
