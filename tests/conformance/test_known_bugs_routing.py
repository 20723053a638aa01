"""Bugs of public systems, in routing: each test fails for a system that has the bug, as in test_known_bugs.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import executors
from executors import Executor
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.wrapped import LayerChange, Wrapped, configured, experts, narrow
from moe_ref.routing import route, weigh
from moe_ref.types import Routing
from planted import NAMES, Bug, Catches, Check, demand_caught

SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
SIGMOID = MoEConfig(2, scoring="sigmoid", renormalize=True)
GROUPED = replace(SIGMOID, num_groups=2, topk_groups=1)

catches = Catches()


def bug(change: LayerChange) -> Bug:
    """A planted bug that changes the layer with its routing."""
    return lambda inner: Wrapped(change.__name__, inner, layer=change)


@pytest.fixture(params=NAMES)
def executor(request: pytest.FixtureRequest) -> Executor:
    return executors.get(request.param)


def shown(executor: Executor, logits: Tensor, config: MoEConfig, bias: Tensor | None = None) -> Tensor:
    """[T, E] The weight of each expert: expert e always returns a one in column e."""
    tokens, num_experts = logits.shape
    nothing = torch.zeros(num_experts, 2, num_experts)
    answers = torch.eye(num_experts)
    weights = MoEWeights(nothing, nothing[:, :1].mT, None, answers, bias, config=config)
    return executor(torch.zeros(tokens, num_experts), logits, weights)


def demand_weights(executor: Executor, logits: Tensor, config: MoEConfig, bias: Tensor | None = None) -> Tensor:
    """Demands the specification's choice and its weights to fp32 accuracy; returns the weights."""
    given = logits.clone().requires_grad_()
    weights = shown(executor, given, config, bias)
    expected = torch.zeros(logits.shape, dtype=torch.float64)
    routing = route(logits.double(), config, None if bias is None else bias.double())
    expected.scatter_(1, routing.topk_ids, routing.topk_weights)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-30)
    (weights * torch.arange(1.0, weights.numel() + 1).view_as(weights)).sum().backward()
    assert given.grad is not None
    assert given.grad.isfinite().all()
    return expected


@bug
def torch_topk(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    ids = logits.topk(weights.config.top_k).indices
    return experts(inner, x, ids, narrow(weigh(logits.double(), ids, weights.config), x), weights)


@catches("higher_id_wins_ties", torch_topk)
def test_r2_ties_in_bf16_choose_the_lower_id(executor: Executor) -> None:
    """Logits tie often in bf16, and torch.topk breaks ties arbitrarily: topk(zeros(8), 3) is 6, 5, 4 on a CPU."""
    logits = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    best = logits.float().sort(dim=1, descending=True).values
    assert (best[:, 7] == best[:, 8]).any()  # at the cut
    for scoring in SCORINGS:
        demand_weights(executor, logits, MoEConfig(8, scoring=scoring))
        chosen = demand_weights(executor, torch.zeros(1, 8).bfloat16(), MoEConfig(3, scoring=scoring))
        assert chosen.nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
        signed = torch.tensor([[-0.0, 0.0, -1.0, -0.0]]).bfloat16()
        assert demand_weights(executor, signed, MoEConfig(2, scoring=scoring)).nonzero().tolist() == [[0, 0], [0, 1]]


@bug
def lowest_is_finite(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The search for the largest starts from -1e4."""
    config = weights.config
    ids = route(logits.clamp(min=-1e4), config, weights.selection_bias).topk_ids
    return experts(inner, x, ids, narrow(weigh(logits.double(), ids, config), x), weights)


@catches("negative_logits_count_as_zero", "other_groups_count_as_zero", lowest_is_finite)
def test_r2_negative_logits_and_keys(executor: Executor) -> None:
    """A search for the largest that starts from zero misrouted rows of negative logits (flashinfer 2822)."""
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    far = -logits.abs() - torch.tensor([1.0, 20.0, 1e3, 1e5]).repeat(4)[:, None]
    for scoring in SCORINGS[:2]:
        demand_weights(executor, far, MoEConfig(3, scoring=scoring))
        demand_weights(executor, logits - 1e30 * (1 + torch.arange(8) % 5), MoEConfig(3, scoring=scoring))
        demand_weights(executor, logits.masked_fill(logits > 0.5, -math.inf), MoEConfig(3, scoring=scoring))
    demand_weights(executor, logits - 30, replace(SIGMOID, top_k=3))
    demand_weights(executor, logits, GROUPED, -10.0 - torch.arange(8.0))  # all keys are negative


@catches("score_recovered_from_key", "selection_bias_in_weights", "selection_bias_forgotten")
def test_r3_the_weight_does_not_go_through_the_key(executor: Executor) -> None:
    """The weight was recovered as (score + bias) - bias: a large bias leaves no digit of it (flashinfer 3875)."""
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(2)) - 6
    bias = 1e4 * torch.tensor([1.0, 8.0, 3.0, 6.0, 5.0, 4.0, 7.0, 2.0])
    for config in (replace(SIGMOID, renormalize=False), SIGMOID, GROUPED):
        weights = demand_weights(executor, logits, config, bias)
        if not config.renormalize:
            exact = logits.double().sigmoid()
            assert torch.equal(weights.nonzero()[:, 1].view(-1, 2), torch.tensor([[1, 6]]).expand(32, 2))
            torch.testing.assert_close(weights[:, [1, 6]], exact[:, [1, 6]], rtol=1e-12, atol=0)


@dataclass(frozen=True)
class Rerouted:
    """An executor that changes the ids in rows with a NaN."""

    inner: Executor
    change: Callable[[Tensor, int], Tensor]
    name = "rerouted"

    @property
    def capabilities(self) -> executors.Capabilities:
        return self.inner.capabilities

    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        routing = self.inner.route(router_logits, weights)
        broken = router_logits.isnan().any(-1, keepdim=True)
        changed = self.change(routing.topk_ids, weights.num_experts)
        return replace(routing, topk_ids=torch.where(broken, changed, routing.topk_ids))

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        routing = self.route(router_logits, weights)
        ids, slot_weights = routing.topk_ids, routing.topk_weights
        return self.inner.experts(x, topk_ids=ids, topk_weights=slot_weights, weights=weights)


def nan_gives_one_expert_twice(inner: Executor) -> Executor:
    return Rerouted(inner, lambda ids, num_experts: torch.zeros_like(ids))


def nan_gives_no_expert(inner: Executor) -> Executor:
    return Rerouted(inner, lambda ids, num_experts: torch.full_like(ids, num_experts))


@bug
def nan_counts_as_zero(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    return inner(x, logits.nan_to_num(0.0, math.inf, -math.inf), weights)


@catches("nan_leaks_to_next_token", nan_gives_one_expert_twice, nan_gives_no_expert, nan_counts_as_zero)
def test_r4_nan_logits_stay_in_their_token(executor: Executor) -> None:
    """NaN logits gave ids out of range, or one id twice (vllm 39391, sglang 30079)."""
    for scoring in SCORINGS:
        for groups, bias in ((1, ""), (1, "small"), (3, ""), (3, "small")):
            config = MoEConfig(2, scoring=scoring, num_groups=groups, topk_groups=1)
            problem = Problem(12, 9, 8, 4, config, selection_bias=bias, broken_logits=4)
            check_problem(executor, problem)
    logits = torch.zeros(8, 8)
    logits.fill_diagonal_(math.nan)
    logits[0] = math.nan
    weights = shown(executor, logits, SIGMOID)
    assert weights.isnan().all()
    if hasattr(executor, "route"):
        layer = MoEWeights(torch.zeros(8, 2, 1), torch.zeros(8, 1, 1), config=replace(SIGMOID, top_k=8))
        ids = executor.route(logits, layer).topk_ids
        assert torch.equal(ids.sort(dim=1).values, torch.arange(8).expand(8, 8))


def renormalized(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights, eps: float) -> Tensor:
    """Divides by the sum and this epsilon, whatever that is."""
    plain = inner.route(logits, configured(weights, renormalize=False))
    divided = plain.topk_weights / (plain.topk_weights.sum(dim=-1, keepdim=True) + eps)
    return inner.experts(x, topk_ids=plain.topk_ids, topk_weights=divided, weights=weights)


@bug
def no_epsilon(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    return renormalized(inner, x, logits, weights, 0.0)


@bug
def epsilon_in_fp16(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    return renormalized(inner, x, logits, weights, float(np.float16(weights.config.renormalize_eps)))


@bug
def zero_over_zero_hidden(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Only the gradient is NaN."""
    return no_epsilon(inner)(x, logits, weights).nan_to_num(0.0)


@catches(no_epsilon, epsilon_in_fp16, zero_over_zero_hidden)
def test_r5_no_zero_over_zero(executor: Executor) -> None:
    """Where all chosen scores underflow, renormalising them without an epsilon is 0/0 (flashinfer 3803)."""
    for low in (-200.0, -1e4, -math.inf):
        assert (demand_weights(executor, torch.full((3, 4), low), SIGMOID) < 1e-30).all()
    bias = torch.tensor([0.0, 5.0, 5.0, 5.0])  # leaves out the only expert whose score is not 0 in fp32
    under = torch.tensor([[0.0, -300.0, -300.0, -300.0]])
    assert (demand_weights(executor, under, MoEConfig(2, renormalize=True), bias) < 1e-30).all()
    half = demand_weights(executor, torch.zeros(1, 2), MoEConfig(1, renormalize=True, renormalize_eps=0.5))
    assert half.tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("check", "planted"), catches.pairs())
def test_planted_bug_is_caught(check: Check, planted: Bug, name: str) -> None:
    demand_caught(check, planted, name)


def test_every_test_of_an_executor_has_a_planted_bug() -> None:
    catches.demand_that_all_have_bugs(globals())
