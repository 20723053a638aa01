"""The norm of each expert's output (E8): what executors promise of it beyond the numbers, and who refuses it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import executors
from dense_cases import EVERYTHING, PROBLEM, HostReads, arguments, demand_one_graph, each, inputs_of, needs_all
from executors import native
from executors._base.executor import LayerExecutor
from executors._protocol import check_norm
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.problems.declared import undeclared, without_undeclared
from moe_ref.conformance.problems.problem import Problem

NORMED = replace(EVERYTHING, post_expert_norm=True)
PLAIN = replace(PROBLEM, post_expert_norm=True, dtype="bfloat16", bias_dtype="bfloat16")
each_one = pytest.mark.parametrize("name", ["native", "grouped_mm", "numba"])


def gradients(name: str, inputs: Inputs, **options: bool) -> dict[str, torch.Tensor]:
    y = call(executors.get(name, **options), inputs)
    y.backward(inputs.dy)
    found = {leaf: value.grad for leaf, value in inputs.tensors().items() if value.grad is not None}
    return {"y": y.detach()} | found


@each_one
@pytest.mark.parametrize("scale_input", [False, True])
def test_a_single_gradient_is_the_same(name: str, scale_input: bool) -> None:
    """Whatever else is left out for it; and what is frozen has none."""
    problem = replace(NORMED, config=replace(NORMED.config, scale_input=scale_input))
    full = gradients(name, inputs_of(problem))
    leaves = full.keys() - {"y"}
    assert "post_expert_norm" in leaves
    for leaf in leaves:
        alone = gradients(name, inputs_of(replace(problem, frozen=frozenset(leaves - {leaf}))))
        assert alone.keys() == {"y", leaf}
        assert torch.equal(alone[leaf], full[leaf]), leaf


@each_one
@pytest.mark.parametrize("problem", [NORMED, PLAIN])
def test_recompute_gives_the_same_bits(name: str, problem: Problem) -> None:
    """D4."""
    kept, anew = (gradients(name, inputs_of(problem), recompute=option) for option in (False, True))
    assert kept.keys() == anew.keys()
    for leaf, value in kept.items():
        assert torch.equal(value, anew[leaf]), leaf


def test_the_factor_s_gradient_repeats_with_any_number_of_threads() -> None:
    """C1: it is a sum over thousands of slots."""
    problem = replace(PLAIN, tokens=4096, config=MoEConfig(2))
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 4, 4):
            torch.set_num_threads(number)
            found.append(gradients("native", inputs_of(problem))["post_expert_norm"])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], gradient) for gradient in found)


def test_nothing_waits_for_a_gpu() -> None:
    inputs = inputs_of(NORMED)
    with HostReads() as forward:
        y = call(executors.get("grouped_mm"), inputs)
    with HostReads() as backward:
        y.backward(inputs.dy)
    assert forward.reads == backward.reads == []


def test_tracers_see_one_graph() -> None:
    demand_one_graph(executors.get("native"), NORMED)


def test_operators_keep_torch_s_rules() -> None:
    """Schema, autograd, fake kernels."""
    inputs = inputs_of(replace(NORMED, entry="experts"))
    given = each(arguments(inputs), lambda tensor: tensor.detach())
    y, *kept = native.OPERATOR.forward(*given, True, False)
    torch.library.opcheck(native.OPERATOR.backward, (torch.ones_like(y), *kept, needs_all(given), *given))


def test_a_layer_without_norm_is_given_nothing_more() -> None:
    """Its operator sees no tensor and no number that depends on the epsilon."""
    given = arguments(inputs_of(replace(PROBLEM, entry="experts")))
    assert given.norm() is None
    assert given.post_expert_norm is None


class Old(LayerExecutor):
    """An executor that was written before the norm: it knows nothing of the field, and declares nothing."""

    name = "old"

    def _apply(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, weights: MoEWeights
    ) -> torch.Tensor:
        plain = replace(weights, post_expert_norm=None)
        return executors.get("native").experts(x, topk_ids=topk_ids, topk_weights=topk_weights, weights=plain)


class Foreign(Old):
    """One that checks nothing of what it does not know."""

    name = "foreign"

    def check(self, x: torch.Tensor, weights: MoEWeights) -> None:
        """Takes everything."""


@pytest.fixture
def foreign() -> Iterator[str]:
    executors.register("foreign", Foreign)
    yield "foreign"
    executors.unregister("foreign")


REFUSAL = r"^post_expert_norm\.shape=\(16,\): must be None for "


@pytest.mark.parametrize("entry", ["layer", "experts"])
def test_an_executor_that_lacks_it_refuses_it_and_is_not_judged_on_it(entry: str) -> None:
    inputs = inputs_of(replace(PLAIN, entry=entry))
    for action in (lambda: Old().check(inputs.x, inputs.weights), lambda: call(Old(), inputs)):
        with pytest.raises(executors.Unsupported, match=f"{REFUSAL}old$"):
            action()
    call(Old(), inputs_of(replace(PLAIN, entry=entry, post_expert_norm=False)))
    assert undeclared(PLAIN, Old().capabilities) == "a norm after each expert"
    assert without_undeclared(PLAIN, Old().capabilities) == replace(PLAIN, post_expert_norm=False)


def test_nobody_gives_it_to_one_that_would_leave_it_out(foreign: str) -> None:
    inputs = inputs_of(PLAIN)
    rows = {row.name: row.reason for row in executors.explain(inputs.x, inputs.weights)}
    assert rows[foreign] == "post_expert_norm.shape=(16,): must be None for foreign"
    assert rows["native"] == rows["grouped_mm"] == rows["auto"] == ""
    plain = replace(inputs.weights, post_expert_norm=None)
    assert {row.name: row.reason for row in executors.explain(inputs.x, plain)}[foreign] == ""
    with pytest.raises(executors.Unsupported, match=f"{REFUSAL}object$"):
        check_norm(object(), inputs.weights)


def test_auto_chooses_one_that_has_it() -> None:
    inputs = inputs_of(PLAIN)
    assert executors.get("auto").choose(inputs.x, inputs.weights)[0] == "native"
    assert torch.equal(call(executors.get("auto"), inputs), call(executors.get("native"), inputs))


def test_a_layer_with_other_arrays_has_another_factor() -> None:
    weights = MoEWeights(torch.ones(2, 4, 3), torch.ones(2, 3, 2), config=MoEConfig(1), post_expert_norm=torch.ones(3))
    assert weights.map(lambda array: 2 * array).post_expert_norm.tolist() == [2.0] * 3
    assert weights.with_parameters({"post_expert_norm": torch.zeros(3)}).post_expert_norm.tolist() == [0.0] * 3
    assert weights.parameters().keys() == {"gate_up_proj", "down_proj", "post_expert_norm"}
