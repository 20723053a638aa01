"""The parts of the suite: problems, poison, and checks, each of which can fail."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, find, settings

import executors
from moe_ref import MoEConfig, MoEWeights
from moe_ref.activations import act, split_gate_up
from moe_ref.conformance import profiles
from moe_ref.conformance.honest import honest_variants
from moe_ref.conformance.judgement.call import lay_out, run, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem, check_repeatable
from moe_ref.conformance.judgement.errors import check_errors
from moe_ref.conformance.judgement.exact import CASES, check_exact
from moe_ref.conformance.judgement.invariance import check_batch_invariance
from moe_ref.conformance.judgement.laws import LAWS, SENTENCES, check_law
from moe_ref.conformance.judgement.ranges import check_range
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.judgement.second_derivatives import (
    LIMIT,
    check_second_derivatives,
    directions,
    measured,
    second_derivatives,
)
from moe_ref.conformance.judgement.second_derivatives import problems_of as problems_with_second_derivatives
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.mutants._registry import SECOND_MUTANTS
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.pinned import EXAMPLES
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems
from moe_ref.conformance.wrapped import Wrapped, experts
from moe_ref.numerics import FORMATS

PROBLEM = Problem(24, 7, 16, 12, MoEConfig(3, scoring="sigmoid", renormalize=True), down_bias=True, seed=8)
QUICK = settings(database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def native() -> executors.Executor:
    return executors.get("native")


def mutant(name: str) -> Wrapped:
    return mutants(native())[name]


def test_problems_shrink_to_nothing() -> None:
    smallest = find(problems(), lambda _: True, settings=QUICK)
    assert (smallest.tokens, smallest.experts, smallest.top_k, smallest.hidden) == (0, 1, 1, 1)
    assert smallest.config == MoEConfig(1, scoring="softmax")
    assert (smallest.seed, smallest.frozen, smallest.weights_layout) == (0, frozenset(), "contiguous")


@pytest.mark.parametrize(
    "wanted",
    [
        lambda p: p.entry == "experts" and p.empty_slots and p.cut_points,
        lambda p: p.broken_logits > 1 and p.broken_x,
        lambda p: p.logits == "ties" and p.dtype == "bfloat16",
        lambda p: p.dy_layout == "scalar" and p.weights_layout == "transposed" and p.batch,
        lambda p: p.config.limit == 0.5 and p.gate_up_bias and len(p.frozen) > 2,
        lambda p: p.config.clamp == "after" and p.config.limit == 0.5 and p.tokens > 16,
        lambda p: p.config.gate_softcap and p.config.up_softcap and p.tokens > 1,
        lambda p: p.post_expert_norm and p.config.post_expert_norm_eps == 1e-8 and p.tokens > 1,
        lambda p: p.tokens == 1 and p.experts == 1,
        lambda p: p.top_k == p.experts > 4,
    ],
)
def test_every_kind_of_problem_is_drawn(wanted) -> None:  # type: ignore[no-untyped-def]
    find(problems(), wanted, settings=settings(QUICK, max_examples=5000))


def test_a_problem_prints_as_the_call_that_makes_it() -> None:
    for problem in EXAMPLES:
        assert eval(repr(problem), {"Problem": Problem, "MoEConfig": MoEConfig, "frozenset": frozenset}) == problem


def test_same_problem_same_numbers() -> None:
    first, second = build(PROBLEM), build(PROBLEM)
    assert (first.x == second.x).all()
    assert (build(replace(PROBLEM, seed=9)).x != first.x).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numbers_are_representable_in_their_dtypes(dtype: str) -> None:
    problem = replace(PROBLEM, dtype=dtype, bias_dtype=dtype, routing_dtype=dtype)
    inputs, arrays = to_torch(problem, build(problem)), build(problem)
    assert (inputs.x.detach().double().numpy() == arrays.x).all()
    assert (inputs.weights.gate_up_proj.detach().double().numpy() == arrays.weights.gate_up_proj).all()
    assert (inputs.router_logits.detach().double().numpy() == arrays.router_logits).all()


def live_halves(problem: Problem) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gate and up of each slot of the tokens that dy reaches: more than half of all tokens."""
    arrays = build(problem)
    w, live = arrays.weights, [t for t in range(problem.tokens) if arrays.dy[t].any()]
    assert len(live) > problem.tokens / 2
    slots = [(t, e) for t in live for e in arrays.topk_ids[t]]
    z = [w.gate_up_proj[e] @ arrays.x[t] + w.gate_up_proj_bias[e] for t, e in slots]
    return [split_gate_up(row[None], problem.config) for row in z]


@pytest.mark.parametrize("alpha", [1.0, 1.702, -0.25])  # of a negative one, act(g) falls from 1.1 again
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_no_gradient_hangs_on_an_activation_at_the_limit(limit: float, alpha: float) -> None:
    """The same where the clamp comes after the activation: |act(g)| near the limit, not g."""
    config = replace(PROBLEM.config, limit=limit, clamp="after", alpha=alpha)
    problem = replace(PROBLEM, dtype="bfloat16", gate_up_bias=True, config=config)
    u, at_gate = FORMATS["bfloat16"].unit_roundoff, 0
    for gate, up in live_halves(problem):
        assert np.abs(act(gate, config).value - limit).min() > u * limit
        for moved in (gate * (1 - 2 * u), gate * (1 + 2 * u)):
            assert ((act(moved, config).value > limit) == (act(gate, config).value > limit)).all()
        assert np.abs(np.abs(up) - limit).min() > u * limit
        at_gate += int((act(gate, config).value > limit).sum())
    assert at_gate


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_no_gradient_hangs_on_a_preactivation_at_the_limit(limit: float) -> None:
    """Rounding must not be able to carry a pre-activation across the limit, where the derivative jumps."""
    problem = replace(PROBLEM, dtype="bfloat16", gate_up_bias=True, config=replace(PROBLEM.config, limit=limit))
    u = FORMATS["bfloat16"].unit_roundoff
    for gate, up in live_halves(problem):
        assert np.abs(gate - limit).min() > u * limit
        assert np.abs(np.abs(up) - limit).min() > u * limit


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "scalar"])
def test_layouts_are_what_they_say(layout: str) -> None:
    value = torch.ones(4, 6) if layout in ("expanded", "scalar") else torch.randn(4, 6)
    laid = lay_out(value, layout)
    assert torch.equal(laid, value)
    strides = {"transposed": (1, 4), "sliced": (13, 2), "expanded": (0, 1), "scalar": (0, 0)}
    assert laid.stride() == strides[layout]


def test_unwritten_memory_is_nan() -> None:
    with poisoned():
        made = [
            torch.empty(3),
            torch.empty_like(torch.ones(3)),
            torch.ones(3).new_empty(3),
            torch.empty_strided((3,), (1,)),
            torch.ones(1).resize_(3)[1:],
            torch.empty(3, dtype=torch.bfloat16),
        ]
    assert all(t.isnan().all() for t in made)
    assert not torch.utils.deterministic.fill_uninitialized_memory or not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (check_problem, [PROBLEM]),
        (check_law, [replace(PROBLEM, entry="experts"), "permute_tokens"]),
        (check_exact, ["long_sums", "float32"]),
        (check_range, ["outputs", "dense"]),
    ],
)
@pytest.mark.parametrize("wrong", ["right_in_deterministic_mode_only", "unwritten"])
def test_both_what_users_run_and_poisoned_memory_are_judged(wrong: str, check: Any, arguments: list[Any]) -> None:
    def unwritten(inner, x, ids, w, weights):  # type: ignore[no-untyped-def]
        y = inner.experts(x, topk_ids=ids, topk_weights=w, weights=weights)
        found = torch.empty_like(y[:1])
        return y + torch.where(found.isnan(), found, 0)  # what was left there mostly does no harm

    with pytest.raises(ConformanceError) as caught:
        check(Wrapped(wrong, native(), slots=unwritten) if wrong == "unwritten" else mutant(wrong), *arguments)
    if check is check_problem and wrong != "unwritten":  # where nothing is filled, NaN may lie there by chance
        said = "; only where torch's deterministic mode is off"
        assert all(said in fault.message for fault in caught.value.faults)


def test_references_are_sampled_once() -> None:
    assert reference(PROBLEM) is reference(replace(PROBLEM))


def test_failure_names_executor_clause_and_problem() -> None:
    with pytest.raises(ConformanceError, match=r"^zeros breaks C1, E1, E2: y\(\d+, \d+\)=-?0, but must be") as caught:
        check_problem(mutant("zeros"), PROBLEM)
    assert "Problem(tokens=24" in str(caught.value)


def test_repeatability_can_fail() -> None:
    with pytest.raises(ConformanceError, match="differs between two runs"):
        check_repeatable(mutant("not_repeatable"), PROBLEM)


def test_remembered_weights_are_seen() -> None:
    """A cache of prepared weights, keyed by address, is stale after an optimiser's step."""
    prepared: dict[int, torch.Tensor] = {}

    def cached(inner, x, ids, w, weights: MoEWeights):  # type: ignore[no-untyped-def]
        known = prepared.setdefault(weights.down_proj.data_ptr(), weights.down_proj.detach().clone())
        down = weights.down_proj + (known - weights.down_proj).detach()
        return inner.experts(x, topk_ids=ids, topk_weights=w, weights=replace(weights, down_proj=down))

    with pytest.raises(ConformanceError, match="the same ones put where others were"):
        check_repeatable(Wrapped("cached", native(), slots=cached), PROBLEM)


def test_a_second_backward_pass_is_judged() -> None:
    class Spent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):  # type: ignore[no-untyped-def]
            ctx.times = 0
            return value.view_as(value)

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            ctx.times += 1
            return gradient / ctx.times

    def spent(inner, x, ids, w, weights):  # type: ignore[no-untyped-def]
        return Spent.apply(inner.experts(x, topk_ids=ids, topk_weights=w, weights=weights))

    with pytest.raises(ConformanceError, match="two backward passes through one graph"):
        check_repeatable(Wrapped("spent", native(), slots=spent), PROBLEM)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["wide_combine", "plain_combine"])
def test_combine_in_low_precision_is_seen(case: str, dtype: str) -> None:
    with pytest.raises(ConformanceError, match=case):
        check_exact(mutant("combine_in_x_dtype"), case, dtype)


@pytest.mark.parametrize(
    ("law", "breaker"),
    [
        ("permute_tokens", "token_dropped"),
        ("relabel_experts", "bias_of_neighbour"),
        ("split_batch", "token_dropped"),
        ("scale_weights", "bias_unweighted"),
        ("append_slot", "empty_slot_counts"),
        ("append_expert", "inclusive_ends_read_as_offsets"),
    ],
)
def test_each_law_can_be_broken(law: str, breaker: str) -> None:
    problem = replace(PROBLEM, entry="experts")
    assert check_law(native(), problem, law)
    with pytest.raises(ConformanceError, match=f"the law {law}: .*; the law: {re.escape(SENTENCES[law])}\n"):
        check_law(mutant(breaker), problem, law)


class Leak(torch.autograd.Function):
    """The last expert's gradient is 1 too large."""

    @staticmethod
    def forward(ctx, tensor):  # type: ignore[no-untyped-def]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return torch.cat([gradient[:-1], gradient[-1:] + 1])


def leaking_expert(inner, x, ids, w, weights):  # type: ignore[no-untyped-def]
    return experts(inner, x, ids, w, weights.with_parameters({"down_proj": Leak.apply(weights.down_proj)}))


def leaking_slot(inner, x, ids, w, weights):  # type: ignore[no-untyped-def]
    return experts(inner, x, ids, Leak.apply(w.T).T, weights)


@pytest.mark.parametrize(
    ("law", "leak", "says"),
    [
        ("append_expert", leaking_expert, "the gradient of down_proj of the added expert has 1, but must be exactly 0"),
        ("append_slot", leaking_slot, "the gradient of topk_weights of the added slots has 1, but must be exactly 0"),
    ],
)
def test_what_a_law_adds_is_told_as_such(law: str, leak: Any, says: str) -> None:
    with pytest.raises(ConformanceError, match=f"breaks the law {law}: {says}; the law: "):
        check_law(Wrapped("leak", native(), slots=leak), replace(PROBLEM, entry="experts"), law)


def test_the_page_says_what_each_law_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "adding-an-executor.md").read_text()
    (table,) = re.findall(r"^\| law \| .*\n\|---\|---\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert table.splitlines() == [f"| `{law}` | {SENTENCES[law][0].upper()}{SENTENCES[law][1:]}. |" for law in LAWS]


def test_all_laws_have_a_breaker() -> None:
    parameters = test_each_law_can_be_broken.pytestmark[0].args[1]
    assert {law for law, _ in parameters} == set(LAWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_each_exact_case_can_fail(case: str, dtype: str) -> None:
    check_exact(native(), case, dtype)
    breakers = {
        "long_sums": mutant("hidden_tail_dropped"),
        "many_rows": mutant("weight_gradient_lacks_one_row"),
        "many_rows_of_adapters": mutant("adapters_without_gradient"),
        "clamp_at_equality": mutant("clamp_forgotten"),
        "late_clamp_at_equality": mutant("late_clamp_without_slope"),
        "wide_combine": mutant("one_percent_more"),
        "plain_combine": mutant("one_percent_more"),
        "plain_sums": mutant("hidden_tail_dropped"),
        "plain_rows": mutant("weight_gradient_lacks_one_row"),
        "plain_rows_of_biases": mutant("gate_up_bias_twice"),
        "plain_rows_of_adapters": mutant("adapters_without_gradient"),
        "small_integers": mutant("another_activation"),
    }
    with pytest.raises(ConformanceError, match=case):
        check_exact(breakers[case], case, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_tiles_in_16_bits_are_seen(dtype: str) -> None:
    """A gradient that adds up tiles of 32 rows in x's dtype: 512 ones after 256 would not show it."""
    tiles = mutant("weight_gradients_in_x_dtype")
    check_exact(tiles, "many_rows", dtype)
    with pytest.raises(ConformanceError, match="plain_rows"):
        check_exact(tiles, "plain_rows", dtype)


def bf16_sums(inner: executors.Executor, x, ids, w, weights: MoEWeights):  # type: ignore[no-untyped-def]
    """Adds the features of x one by one into a bf16 result, for a layer of one expert and one column."""
    z = torch.zeros(len(x), dtype=torch.bfloat16)
    for column in (x * weights.gate_up_proj[0, 0]).t():
        z = z + column.bfloat16()
    return (z[:, None] * weights.down_proj[0, :, 0]).to(x.dtype)


def test_bf16_accumulation_stops_at_256() -> None:
    with pytest.raises(ConformanceError, match=r"y\(0, 0\)=256.0, but must be exactly 512.0"):
        check_exact(Wrapped("bf16_sums", native(), slots=bf16_sums), "long_sums", "bfloat16")


@dataclass(frozen=True)
class Careless(Wrapped):
    """Validates nothing."""

    def experts(self, x, *, topk_ids, topk_weights, weights):  # type: ignore[no-untyped-def]
        return x * topk_weights.sum(-1, keepdim=True)

    def __call__(self, x, router_logits, weights):  # type: ignore[no-untyped-def]
        return x * x * router_logits.sum(-1, keepdim=True)


def test_missing_validation_is_seen() -> None:
    with pytest.raises(ConformanceError, match="the contract on errors"):
        check_errors(Careless("careless", native()))


def test_a_second_derivative_may_be_right_or_refused() -> None:
    """D1: of plain autograd, of a custom operator, and of a function that is differentiable once."""
    variants = honest_variants(native())
    for executor in (native(), variants["weight_before_down_projection"], variants["rounded_at_every_site"]):
        assert check_second_derivatives(executor) == ""


@pytest.mark.parametrize("mutant_name", SECOND_MUTANTS)
def test_what_is_wrong_in_second_derivatives_is_right_in_gradients(mutant_name: str) -> None:
    """Nothing else of the suite could see it."""
    check_problem(mutant(mutant_name), PROBLEM)
    check_repeatable(mutant(mutant_name), PROBLEM)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(4))
def test_second_derivatives_keep_a_distance_from_their_limit(dtype: str, seed: int) -> None:
    """An honest loop in plain torch stays below a third of it; what is wrong is above it (docs/tolerance.md)."""
    honest = honest_variants(native())["weight_before_down_projection"]
    for problem in problems_with_second_derivatives(honest):
        problem = replace(problem, dtype=dtype, seed=seed)
        arrays = build(problem)
        along = directions(problem, arrays)
        found = second_derivatives(honest, to_torch(problem, arrays), along)
        assert found is not None
        assert max(measured(problem, arrays, along, found).values()) < LIMIT / 3


def test_missing_gradient_is_seen() -> None:
    def detached(inner, x, ids, w, weights):  # type: ignore[no-untyped-def]
        return inner.experts(x.detach(), topk_ids=ids, topk_weights=w, weights=weights)

    with pytest.raises(ConformanceError, match="no gradient for x"):
        check_problem(Wrapped("detached", native(), slots=detached), PROBLEM)


def test_routing_is_judged() -> None:
    class HigherIdFirst:
        name, capabilities = "higher", native().capabilities

        def __call__(self, x, router_logits, weights):  # type: ignore[no-untyped-def]
            return native()(x, router_logits, weights)

        def route(self, router_logits, weights):  # type: ignore[no-untyped-def]
            routing = native().route(router_logits, weights)
            return replace(routing, topk_ids=routing.topk_ids.flip(-1))

    with pytest.raises(ConformanceError, match="breaks R2: topk_ids"):
        check_problem(HigherIdFirst(), replace(PROBLEM, logits="ties"))


def test_broken_tokens_are_excused_and_no_others() -> None:
    config = replace(PROBLEM.config, scoring="softmax")  # for sigmoid, +inf is not broken
    problem = replace(PROBLEM, config=config, broken_logits=3, broken_x=1, seed=1)
    check_problem(native(), problem)
    assert reference(problem).broken.sum() == 4
    result = run(native(), to_torch(problem, build(problem)))
    assert result.tensors["y"].isnan().all(dim=1).sum() == 4


def test_profiles_say_what_they_are_for() -> None:
    assert set(profiles.PROFILES) == {"quick", "dev", "ci", "nightly"}
    for name in ("quick", "ci"):
        assert profiles.PROFILES[name].derandomize
        assert profiles.PROFILES[name].database is None
    assert profiles.PROFILES["nightly"].max_examples >= 1000


def test_weights_of_empty_slots_may_be_anything() -> None:
    arrays = build(replace(PROBLEM, entry="experts", empty_slots=True))
    empty = (arrays.topk_ids < 0) | (arrays.topk_ids >= PROBLEM.experts)
    assert empty.any()
    assert not np.isfinite(arrays.topk_weights[empty]).all()
    assert math.isfinite(arrays.topk_weights[~empty].sum())


@dataclass(frozen=True)
class Declared(Wrapped):
    """Declares batch invariance."""

    @property
    def capabilities(self) -> executors.Capabilities:
        return replace(self.inner.capabilities, batch_invariant=True)


def token_by_token(inner, x, ids, w, weights):  # type: ignore[no-untyped-def]
    parts = [
        inner.experts(x[t : t + 1], topk_ids=ids[t : t + 1], topk_weights=w[t : t + 1], weights=weights)
        for t in range(len(x))
    ]
    return torch.cat(parts) if parts else x


def with_the_batch(inner, x, ids, w, weights):  # type: ignore[no-untyped-def]
    """One row more or less changes the last bits."""
    y = inner.experts(x, topk_ids=ids, topk_weights=w, weights=weights)
    return y * (1 + 2.0**-23 * (len(x) % 2))


@pytest.mark.parametrize("seed", range(5))
def test_batch_invariance_is_judged_where_it_is_declared(seed: int) -> None:
    """C2."""
    problem = replace(PROBLEM, tokens=23 + seed, seed=seed)
    assert not check_batch_invariance(Wrapped("silent", native(), slots=with_the_batch), problem)
    assert check_batch_invariance(Declared("invariant", native(), slots=token_by_token), problem)


def test_broken_batch_invariance_is_seen() -> None:
    """C2."""
    found = []
    for seed in range(5):
        try:
            check_batch_invariance(
                Declared("variant", native(), slots=with_the_batch), replace(PROBLEM, tokens=23, seed=seed)
            )
        except ConformanceError as error:
            found.append(error.clause)
    assert set(found) == {"C2"}
