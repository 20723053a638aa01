"""Choosing with a bias and in groups, and which choices rounding admits (R2, R3)."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

import executors
from moe_ref import MoEConfig, MoEWeights, route
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem
from moe_ref.conformance.judgement.choices import UNIT, admissible, have_margins
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.declared import undeclared, without_undeclared
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import RenormalizeForm, Scoring, SelectionKey

SIGMOID = MoEConfig(2, scoring="sigmoid")
GROUPS = MoEConfig(2, scoring="sigmoid", num_groups=2, topk_groups=1)
NO_BIAS = np.zeros(4)


def is_right(ids: list[int], logits: list[float], config: MoEConfig, bias: np.ndarray = NO_BIAS) -> bool:
    return bool(admissible(np.array([ids]), np.array([logits]), config, bias)[0])


def test_only_the_largest_keys_are_right() -> None:
    """R2."""
    logits = [0.0, 2.0, 1.0, -1.0]
    assert is_right([1, 2], logits, SIGMOID)
    assert not is_right([1, 0], logits, SIGMOID)
    assert not is_right([2, 1], logits, SIGMOID)  # not in the order of their keys


def test_keys_within_rounding_may_be_chosen_either_way() -> None:
    """R2: d = 4 * 2**-23 for scores and biases of at most 1."""
    for distance, right in ((0.9 * UNIT, True), (1.1 * UNIT, False)):
        bias = np.array([0.0, 0.0, -distance, -1.0])
        assert is_right([0, 2], [0.0] * 4, SIGMOID, bias) == right
        assert is_right([0, 1], [0.0] * 4, SIGMOID, bias)


def test_the_slack_grows_with_the_bias() -> None:
    """R2: rounding is relative to the larger of score and bias."""
    bias = np.array([100.0, 100.0, 100.0 - 50 * UNIT, 0.0])
    assert is_right([0, 2], [0.0] * 4, SIGMOID, bias)
    assert not is_right([0, 2], [0.0] * 4, SIGMOID, bias - np.array([99.0, 99.0, 99.0, 0.0]))


def test_an_infinite_bias_leaves_the_slack_finite() -> None:
    """R2: it masks an expert, or calls for one. It once admitted every choice, or refused the specification's own."""
    masked = np.array([-np.inf, 0.0, 0.0, 0.0])
    assert is_right([1, 2], [0.0, 0.5, 0.25, -1.0], SIGMOID, masked)
    assert not is_right([0, 1], [0.0, 0.5, 0.25, -1.0], SIGMOID, masked)
    assert not is_right([1, 3], [0.0, 0.5, 0.25, -1.0], SIGMOID, masked)
    called = np.array([0.0, 0.0, np.inf, 0.0])
    assert is_right([2, 1], [0.0, 0.5, 0.25, -1.0], SIGMOID, called)
    assert not is_right([1, 2], [0.0, 0.5, 0.25, -1.0], SIGMOID, called)
    assert not is_right([2, 0], [0.0, 0.5, 0.25, -1.0], SIGMOID, called)


@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
def test_infinite_keys_are_exact(infinite: float) -> None:
    """R2: of equal ones the lower id wins, as rounding does not touch them."""
    bias = np.full(4, infinite)
    assert is_right([0, 1], [0.0, 1.0, 2.0, 3.0], SIGMOID, bias)
    for other in ([1, 0], [0, 2], [2, 3]):
        assert not is_right(other, [0.0, 1.0, 2.0, 3.0], SIGMOID, bias)
        assert not is_right(other, [0.0, 1.0, 2.0, 3.0], replace(GROUPS, topk_groups=2), bias)
    assert not is_right([2, 3], [0.0, 1.0, 2.0, 3.0], GROUPS, bias)


def test_an_infinite_logit_leaves_the_slack_finite() -> None:
    """R2: where the key is the logit itself plus a bias."""
    by_logit, masked = MoEConfig(2, "topk_softmax"), [-np.inf, 1.0, 0.5, 0.0]
    assert is_right([1, 2], masked, by_logit)
    assert not is_right([1, 3], masked, by_logit)
    assert not is_right([1, 0], masked, by_logit)


def test_experts_outside_the_kept_groups_are_in_the_order_of_ids() -> None:
    """R2: their keys are -inf, whatever they were before. Such a choice was once refused."""
    config = MoEConfig(3, "sigmoid", num_groups=2, topk_groups=1)
    logits = [0.0, 1.0, 0.5, 2.0, -np.inf, -np.inf]
    assert route(np.array([logits]), config).topk_ids.tolist() == [[3, 0, 1]]
    assert is_right([3, 0, 1], logits, config, np.zeros(6))
    assert not is_right([3, 1, 0], logits, config, np.zeros(6))


def test_the_specification_chooses_right_under_masks() -> None:
    """R2, R4: and another expert in place of a chosen one is wrong, but for near ties."""
    rng = np.random.default_rng(0)
    configs = SIGMOID, replace(SIGMOID, selection_key="logit"), replace(GROUPS, group_score="top2_sum"), GROUPS
    for config in configs:
        for _ in range(50):
            logits, bias = rng.standard_normal((4, 6)), rng.choice([0.0, 0.5, -np.inf, np.inf, np.nan], 6)
            logits[rng.random((4, 6)) < 0.2] = -np.inf
            ids = route(logits, config, bias).topk_ids
            assert admissible(ids, logits, config, bias).all()
            for other in set(range(6)) - set(ids[0].tolist()):
                assert not admissible(np.array([[ids[0, 0], other]]), logits[:1], config, bias)[0]


def test_groups_come_first() -> None:
    """R2: the best expert of another group does not count."""
    logits = [3.0, -1.0, 2.0, 1.9]
    assert is_right([0, 1], logits, GROUPS)
    assert not is_right([0, 2], logits, GROUPS)
    assert not is_right([2, 3], logits, GROUPS)
    assert is_right([2, 3], logits, replace(GROUPS, group_score="top2_sum"))


def test_groups_within_rounding_may_be_kept_either_way() -> None:
    """R2: but experts of two groups are never mixed."""
    logits = [1.0, 0.0, 1.0, 0.5]
    assert is_right([0, 1], logits, GROUPS)
    assert is_right([2, 3], logits, GROUPS)
    assert not is_right([0, 2], logits, GROUPS)


@pytest.mark.parametrize("config", [SIGMOID, GROUPS, replace(GROUPS, group_score="top2_sum"), MoEConfig(2)])
def test_the_specification_chooses_right(config: MoEConfig) -> None:
    rng = np.random.default_rng(0)
    logits, bias = rng.integers(-2, 3, (500, 4)).astype(float), np.array([0.0, 0.5, -0.5, 0.0])
    assert admissible(route(logits, config, bias).topk_ids, logits, config, bias).all()


@pytest.mark.parametrize("selection_key", ["score", "logit"])
@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"])
def test_executors_choose_right_where_keys_tie(scoring: str, selection_key: str) -> None:
    """R2: fp32 against float64, on logits with few distinct values."""
    rng = np.random.default_rng(1)
    groups = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}
    config = MoEConfig(3, scoring, selection_key=selection_key, **groups)
    logits, bias = rng.integers(-2, 3, (2000, 16)).astype(float), rng.choice([0.0, 0.25, 1.0], 16)
    weights = MoEWeights(
        torch.zeros(16, 4, 3), torch.zeros(16, 3, 2), selection_bias=torch.tensor(bias).float(), config=config
    )
    ids = executors.get("native").route(torch.tensor(logits).float(), weights).topk_ids.numpy()
    assert admissible(ids, logits, config, bias).all()
    assert not have_margins(logits, config, bias).all()


def test_margins_are_wider_than_what_is_admitted() -> None:
    for distance, clear in ((7 * UNIT, False), (9 * UNIT, True)):
        bias = np.array([[0.0, 0.0, -distance, -1.0]])[0]
        assert have_margins(np.zeros((1, 4)), SIGMOID, bias).tolist() == [clear]
    assert have_margins(np.zeros((1, 4)), SIGMOID, None).tolist() == [True]  # the logit is the key: exact


def test_problems_with_margins_have_them() -> None:
    problem = Problem(64, 8, 4, 4, GROUPS, logits="ties", selection_bias="small", margins=True)
    arrays = build(problem)
    assert have_margins(arrays.router_logits, GROUPS, arrays.weights.selection_bias).all()
    arrays = build(replace(problem, margins=False, selection_bias=""))
    assert not have_margins(arrays.router_logits, GROUPS, None).all()


class Otherwise:
    """Chooses another right choice, or a wrong one."""

    name = "otherwise"

    def __init__(self, shift: float) -> None:
        self.inner, self.shift = executors.get("native"), shift
        self.capabilities = self.inner.capabilities

    def route(self, router_logits, weights):  # type: ignore[no-untyped-def]
        bias = self.shift * torch.arange(weights.num_experts)
        return self.inner.route(router_logits, replace(weights, selection_bias=bias))

    def __call__(self, x, router_logits, weights):  # type: ignore[no-untyped-def]
        routing = self.route(router_logits, weights)
        return self.inner.experts(x, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights, weights=weights)


def test_another_right_choice_is_judged_on_its_own() -> None:
    """R2: an executor that offers route."""
    problem = Problem(64, 8, 4, 4, GROUPS, logits="ties", seed=1)
    arrays, other = build(problem), Otherwise(5e-8)
    weights = arrays.weights.map(torch.from_numpy)
    ids = other.route(torch.from_numpy(arrays.router_logits).float(), weights).topk_ids.numpy()
    assert (ids != arrays.topk_ids).any()
    check_problem(other, problem)
    with pytest.raises(ConformanceError, match="breaks R2"):
        check_problem(Otherwise(0.2), problem)


class Narrow(Otherwise):
    """Chooses right, and returns ids in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(0.0)
        self.dtype = dtype

    def route(self, router_logits, weights):  # type: ignore[no-untyped-def]
        routing = self.inner.route(router_logits, weights)
        return replace(routing, topk_ids=routing.topk_ids.to(self.dtype))


def test_ids_of_route_are_int64() -> None:
    """T1: int32 ones do not index; torch refuses them in one_hot and scatter."""
    problem = Problem(6, 8, 4, 4, MoEConfig(2))
    check_problem(Narrow(torch.int64), problem)
    with pytest.raises(ConformanceError, match="breaks T1: route returns topk_ids in int32, but must return int64"):
        check_problem(Narrow(torch.int32), problem)


def test_slack_is_that_of_the_logit_under_its_key() -> None:
    """R2: with logits of 100 the key is far coarser than a sigmoid."""
    by_logit = replace(SIGMOID, selection_key="logit")
    logits = np.array([[100.0, 99.0, 98.9999, 50.0]])
    assert admissible(np.array([[0, 2]]), logits, by_logit, NO_BIAS).tolist() == [False]
    assert have_margins(logits, by_logit, NO_BIAS).tolist() == [False]
    logits[0, 2] = 98.99999
    assert admissible(np.array([[0, 2]]), logits, by_logit, NO_BIAS).tolist() == [True]


def test_at_equality_with_epsilon_the_divisor_is_the_sum() -> None:
    """R5: a weight of s / s has no gradient; that of s / eps would have one."""
    config = MoEConfig(1, renormalize=True, renormalize_eps=0.5, renormalize_form="max")
    weights = MoEWeights(torch.zeros(2, 2, 1), torch.zeros(2, 1, 1), config=config)
    logits = torch.zeros(1, 2, requires_grad=True)
    routing = executors.get("native").route(logits, weights)
    routing.topk_weights.sum().backward()
    assert routing.topk_weights.tolist() == [[1.0]]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_no_sum_of_scores_is_near_the_epsilon() -> None:
    """There the gradient jumps, and rounding decides which one it is (R5)."""
    config = MoEConfig(1, renormalize=True, renormalize_eps=0.5, renormalize_form="max")
    problem = Problem(64, 2, 4, 4, config, logits="ties", seed=1)
    totals = np.sort(np.exp(build(problem).router_logits), axis=1)
    assert not np.isclose(totals[:, 1] / totals.sum(axis=1), 0.5, rtol=1e-3).any()
    ties = build(replace(problem, config=replace(config, renormalize_form="add"))).router_logits
    assert (ties[:, 0] == ties[:, 1]).any()


def test_every_name_of_the_configuration_is_declared_by_default() -> None:
    able = executors.Capabilities()
    assert able.scorings == set(get_args(Scoring))
    assert able.renormalize_forms == set(get_args(RenormalizeForm))
    assert able.selection_keys == set(get_args(SelectionKey))


def test_forms_that_an_executor_lacks_are_named_and_not_drawn() -> None:
    some = executors.Capabilities(
        scorings=frozenset({"sigmoid"}),
        renormalize_forms=frozenset({"add"}),
        selection_keys=frozenset({"score"}),
        expert_scale=False,
    )
    config = MoEConfig(2, "sqrtsoftplus", True, renormalize_form="max", selection_key="logit")
    problem = Problem(4, 4, 4, 4, config, expert_scale=True)
    lacking = "scoring sqrtsoftplus, renormalize_form max, selection_key logit, expert_scale"
    assert undeclared(problem, some) == lacking
    assert undeclared(problem, executors.Capabilities()) == ""
    drawn = without_undeclared(problem, some)
    assert undeclared(drawn, some) == ""
    assert drawn == Problem(4, 4, 4, 4, MoEConfig(2, "sigmoid", True))
    assert undeclared(replace(problem, entry="experts"), some) == ""
