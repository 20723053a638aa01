"""Expert parallelism: parts of layers, bits, torch's machinery, and bugs that must be seen."""

from dataclasses import replace

import pytest

import executors
import parallel_calls as calls
from executors.parallel import ExpertMap
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.parallel.cluster import Cluster
from moe_ref.conformance.parallel.judging import LAWS, check_parallel, check_parallel_law
from moe_ref.conformance.parallel.split import Split
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig
from parallel_mutants import MUTANTS, Invariant, plain, rank_dependent


def test_experts_are_those_of_chunk() -> None:
    assert ExpertMap(5, 4).offsets == (0, 2, 4, 5, 5)
    assert ExpertMap(8, 4).offsets == (0, 2, 4, 6, 8)
    assert [*ExpertMap(5, 4).experts(2)] == [4]


FORMS = {
    "dense": calls.PROBLEM,
    "adapters": replace(calls.PROBLEM, gate_up_rank=2, expert_scale=True, post_expert_norm=True),
    "transposed": replace(calls.PROBLEM, weights_layout="transposed"),
    "nf4": replace(calls.PROBLEM, quant_type="nf4", hidden=32, intermediate=32),
    "nf4, nested for each": replace(calls.PROBLEM, quant_type="nf4", nested="per expert", hidden=32, intermediate=32),
    "fp4, nested for all": replace(calls.PROBLEM, quant_type="fp4", nested="one", hidden=32, intermediate=32),
    "mxfp4": replace(calls.PROBLEM, quant_type="mxfp4", hidden=32, intermediate=64),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_parts_are_views_and_come_together_again(cluster: Cluster, form: str, ranks: int) -> None:
    assert cluster.run(calls.there_and_back, FORMS[form], ranks=ranks) == [[]] * ranks


ODD = Problem(8, 5, 17, 15, MoEConfig(2, activation="silu"), quant_type="nf4")


def test_blocks_that_straddle_ranks_are_refused(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match=r"gate_up_proj has 255 numbers of an expert: must be a multiple of block"):
        cluster.run(calls.there_and_back, ODD, ranks=2, goes_on=True)


def test_dtensors_are_taken_as_they_are(cluster: Cluster) -> None:
    assert cluster.run(calls.of_dtensors, ranks=2) == [True, True]
    assert cluster.run(calls.of_replicated_dtensors, ranks=4) == [2, 2, 1, 0]
    (said, _) = cluster.run(calls.of_other_dtensors, ranks=2)
    assert said.startswith("gate_up_proj is a DTensor placed as (Shard(dim=1),)")
    assert "\n" not in said


def test_fsdp2_over_the_other_dimension_of_a_mesh(cluster: Cluster) -> None:
    assert cluster.run(calls.of_two_dimensions) == [[]] * 4


def test_checkpoints_and_compiled_calls_have_the_same_bits(cluster: Cluster) -> None:
    expected = cluster.run(calls.gradients, calls.plain, ranks=2)
    assert cluster.run(calls.gradients, calls.checkpointed, ranks=2) == expected
    assert cluster.run(calls.gradients, calls.compiled, ranks=2) == expected
    assert cluster.run(calls.recomputing, ranks=2) == expected


def test_a_second_derivative_is_an_error(cluster: Cluster) -> None:
    assert all("double backward is not supported" in said for said in cluster.run(calls.differentiated_twice, ranks=2))


def test_bits_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """C2: batch invariance within, and results by slots."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with Cluster(2) as own:
        for dtype in ("float32", "bfloat16"):
            problem = replace(calls.PROBLEM, dtype=dtype)
            for dispatch in ("all_to_all", "all_reduce"):
                assert own.run(calls.same_as_one_device, problem, dispatch) == [True, True], (dtype, dispatch)


SHARED = Problem(9, 5, 8, 8, MoEConfig(3), down_bias=True, seed=1)
WAYS = [Split((2, 2), "all_to_all"), Split((2, 2), "all_to_all", "rank"), Split((2, 2), "all_reduce")]


@pytest.mark.parametrize("split", WAYS, ids=str)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda own: own.__name__)
def test_bugs_are_seen(cluster: Cluster, mutant: object, split: Split) -> None:
    problem = replace(SHARED, tokens=1) if mutant.__name__ == "token_lost" else SHARED  # type: ignore[attr-defined]
    problem = replace(problem, config=MoEConfig(1)) if problem.tokens == 1 else problem
    split = replace(split, cuts=(1, 1)) if problem.tokens == 1 else split
    check_parallel(executors.get("native"), cluster, "native", problem, split)
    with pytest.raises(ConformanceError):
        check_parallel(executors.get("native"), cluster, "native", problem, split, make=mutant)  # type: ignore[arg-type]


@pytest.mark.parametrize("law", LAWS)
def test_a_false_promise_of_batch_invariance_is_seen(cluster: Cluster, law: str) -> None:
    problem, split = replace(SHARED, dtype="float64"), Split((2, 4))
    check_parallel(Invariant(), cluster, "native", problem, split, make=rank_dependent)
    with pytest.raises(ConformanceError, match=f"the law {law}.*\n?.*y of Split"):
        check_parallel_law(Invariant(), cluster, "native", problem, split, law, make=rank_dependent)


@pytest.mark.parametrize("returns", ["slot", "rank"])
def test_the_executor_inside_may_declare_little(cluster: Cluster, returns: str) -> None:
    """Ranks without tokens, duplicate ids and empty slots never reach it, if tokens go to their experts' ranks."""
    problem = replace(SHARED, entry="experts", cut_points=True, empty_slots=True, ids_dtype="int64")
    check_parallel(
        executors.get("native"), cluster, "native", problem, Split((0, 9), "all_to_all", returns), make=plain
    )
    with pytest.raises(ConformanceError, match="dispatch='all_reduce': must be 'all_to_all' for plain: no empty slots"):
        check_parallel(
            executors.get("native"), cluster, "native", problem, Split((2,), "all_reduce", returns), make=plain
        )
