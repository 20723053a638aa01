"""The suite has teeth: every mutant is rejected and every honest variant accepted, at few tokens and at many."""

from dataclasses import replace
from functools import cache

import pytest

import executors
from moe_ref import MoEConfig
from moe_ref.conformance.checks import ConformanceError, check_problem, check_repeatable
from moe_ref.conformance.honest import honest_variants
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.problem import Problem

FULL = MoEConfig(
    4,
    scoring="softmax",
    renormalize=True,
    routed_scaling_factor=2.5,
    alpha=1.702,
    limit=1.0,
    up_offset=1.0,
    gate_up_layout="interleaved",
)
PLAIN = MoEConfig(2, scoring="sigmoid")


@cache
def panel(tokens: int) -> tuple[Problem, ...]:
    """Problems that between them have every feature that a mutant may get wrong."""
    base = Problem(tokens, 9, 32, 33, FULL, gate_up_bias=True, down_bias=True, seed=1)
    concatenated = replace(FULL, gate_up_layout="concatenated")
    return (
        base,
        replace(base, dtype="bfloat16", logits="ties", config=concatenated, seed=2),
        replace(base, experts=33, entry="experts", empty_slots=True, seed=3),
        replace(base, dtype="bfloat16", broken_logits=3, config=PLAIN, intermediate=64, seed=4),
        replace(base, logits="shifted", seed=6),
        replace(base, dtype="float64", routing_dtype="float64", logits="close", seed=7),
        replace(base, experts=17, dtype="float16", entry="experts", cut_points=True, seed=5),
    )


def native() -> executors.Executor:
    return executors.get("native")


def rejected_by(executor: executors.Executor, problem: Problem) -> str:
    """The clause that the executor breaks on this problem, or ""."""
    try:
        check_problem(executor, problem)
        check_repeatable(executor, problem)
    except ConformanceError as error:
        return error.clause
    return ""


@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize("name", sorted(mutants(native())))
def test_mutant_is_rejected(name: str, tokens: int) -> None:
    mutant = mutants(native())[name]
    assert any(rejected_by(mutant, problem) for problem in panel(tokens)), f"{name} survives at T={tokens}"


@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize("name", sorted(honest_variants(native())))
def test_honest_variant_is_accepted(name: str, tokens: int) -> None:
    variant = honest_variants(native())[name]
    for problem in panel(tokens):
        check_problem(variant, problem)


@pytest.mark.parametrize("tokens", [64, 2048])
def test_one_percent_is_seen_in_bf16(tokens: int) -> None:
    """A systematic error far below a single rounding's size per element is caught by the gain."""
    problem = replace(panel(tokens)[1], logits="random")
    with pytest.raises(ConformanceError):
        check_problem(mutants(native())["one_percent_more"], problem)


def test_panel_leaves_experts_empty() -> None:
    """Otherwise no stale gradient could show."""
    from moe_ref.conformance.problem import build

    for tokens in (64, 2048):
        problem = panel(tokens)[-1]
        used = set(build(problem).topk_ids.ravel().tolist())
        assert len(used) < problem.experts
