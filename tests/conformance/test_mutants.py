"""The suite has teeth: every mutant is rejected and every honest variant accepted, at few tokens and at many."""

from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import pytest

import executors
from moe_ref import MoEConfig
from moe_ref.conformance.honest import honest_variants
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem, check_repeatable
from moe_ref.conformance.judgement.exact import check_exact
from moe_ref.conformance.judgement.exact_decode import check_every_code
from moe_ref.conformance.judgement.ranges import RANGES, check_range
from moe_ref.conformance.judgement.second_derivatives import check_second_derivatives
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.mutants._registry import MIXED_MUTANTS, PACKED_KINDS, RANGE_MUTANTS, SECOND_MUTANTS
from moe_ref.conformance.problems.problem import Problem

EXECUTORS = ("native", "grouped_mm", "grouped_nf4")
FEW, MANY = 64, 2048  # tokens
# Errors far below any error bar, or under exponents that no layer has: only equality sees them, whatever T is.
EXACT = {
    "decoded_in_fp32": [*product(("nf4",), ("one", "per expert"), ("float32", "bfloat16"))],
    "nested_scales_fused": [*product(("nf4",), ("one", "per expert"), ("float32", "bfloat16"))],
    "exponent_0_is_zero": [("mxfp4", "", "bfloat16")],
    "exponents_in_7_bits": [("mxfp4", "", "bfloat16")],
}
SUMS = {  # errors that only a sum of ones sees for sure
    "combine_in_x_dtype": "plain_combine",
    "bias_gradients_in_x_dtype": "many_rows",
    "adapter_gradients_in_x_dtype": "many_rows_of_adapters",
    "weight_gradients_in_x_dtype": "plain_rows",
}
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
GROUPED = MoEConfig(
    3,
    scoring="sigmoid",
    renormalize=True,
    num_groups=4,
    topk_groups=2,
    group_score="top2_sum",
    activation="geglu",
)
WHOLE_GROUP = replace(GROUPED, top_k=4, topk_groups=1)
BY_LOGIT = replace(WHOLE_GROUP, scoring="topk_softmax")  # keys below 0 must be chosen
LATE = MoEConfig(4, alpha=1.702, limit=0.5, up_offset=1.0, clamp="after", gate_up_layout="interleaved")
CAPPED = MoEConfig(4, alpha=1.702, up_offset=1.0, gate_softcap=2.0, up_softcap=0.5, gate_up_layout="interleaved")
SQRTSOFTPLUS = MoEConfig(6, scoring="sqrtsoftplus", renormalize=True)
EPSILON = MoEConfig(2, renormalize=True, renormalize_eps=0.6)
SCALED = MoEConfig(2, scoring="topk_softmax", scale_input=True, activation="relu2")
NORMED = MoEConfig(2, renormalize=True, post_expert_norm_eps=1.0)


def panel(name: str, tokens: int) -> tuple[Problem, ...]:
    """Problems that together have every feature that a mutant may get wrong."""
    if name == "grouped_nf4":
        return panel_in_4_bits(tokens)
    return (*dense_panel(tokens), *scoring_panel(tokens), *norm_panel(tokens))


@cache
def panel_in_4_bits(tokens: int) -> tuple[Problem, ...]:
    """Some of the dense problems with weights in 4 bits; blocks of other sizes than 32 straddle experts."""
    forms = (
        {"quant_type": "nf4", "nested": "per expert", "blocksize": 32, "hidden": 64},
        {"quant_type": "nf4", "nested": "one", "weights_layout": "transposed"},
        {"quant_type": "fp4", "blocksize": 128},
    )
    some = [dense_panel(tokens)[place] for place in (1, 5, 10, 0, 2)]
    in_nf4 = [replace(problem, **forms[place % len(forms)]) for place, problem in enumerate(some)]
    stored = ({}, {"weights_layout": "transposed"})
    in_mxfp4 = [
        replace(some[place], quant_type="mxfp4", intermediate=64, **form)
        for place, form in zip((1, 0), stored, strict=True)
    ]
    return (*in_nf4, *in_mxfp4, *mixed_panel(tokens))


@cache
def mixed_panel(tokens: int) -> tuple[Problem, ...]:
    """Layers whose projections are of two kinds: the dense one first or second, and two formats of 4 bits."""
    base = dense_panel(tokens)[1]
    return (
        replace(base, quant_type="nf4", down_quant_type="", weights_layout="transposed"),
        replace(base, down_quant_type="mxfp4", intermediate=64),
        replace(base, quant_type="fp4", down_quant_type="nf4", nested="one"),
    )


@cache
def dense_panel(tokens: int) -> tuple[Problem, ...]:
    """The problems for executors of dense weights."""
    base = Problem(tokens, 9, 32, 33, FULL, gate_up_bias=True, down_bias=True, seed=1)
    concatenated = replace(FULL, gate_up_layout="concatenated")
    return (
        base,
        replace(base, dtype="bfloat16", logits="ties", config=concatenated, seed=2),
        replace(base, experts=33, entry="experts", empty_slots=True, seed=3),
        replace(base, dtype="bfloat16", broken_logits=3, config=PLAIN, intermediate=64, seed=4),
        replace(base, logits="shifted", seed=6),
        replace(base, config=SCALED, gate_up_rank=4, down_rank=3, seed=8),
        replace(base, experts=16, config=GROUPED, selection_bias="small", intermediate=16, seed=9),
        replace(base, experts=16, config=WHOLE_GROUP, selection_bias="large", intermediate=16, seed=10),
        replace(base, experts=16, config=BY_LOGIT, down_rank=3, intermediate=16, seed=11),
        replace(base, dtype="bfloat16", logits="close", routing_dtype="float64", seed=7),
        replace(base, experts=17, dtype="float16", entry="experts", cut_points=True, seed=5),
        replace(base, config=LATE, seed=12),
        replace(base, dtype="bfloat16", config=CAPPED, seed=13),
    )


@cache
def scoring_panel(tokens: int) -> tuple[Problem, ...]:
    """Scores, keys and epsilons of families that differ from the common form."""
    base = Problem(tokens, 9, 32, 33, SQRTSOFTPLUS, seed=1)
    biased = replace(base, selection_bias="small")
    return (
        replace(base, logits="shifted"),
        replace(base, logits="masked", selection_bias="small", seed=2),
        replace(biased, config=replace(PLAIN, selection_key="logit"), seed=3),
        replace(biased, config=replace(EPSILON, renormalize_form="max"), seed=4),
        replace(base, config=EPSILON, seed=5),
        replace(base, config=replace(FULL, routed_scaling_factor=1.0), expert_scale=True, gate_up_bias=True, seed=6),
        replace(base, entry="experts", config=PLAIN, expert_scale=True, frozen=frozenset({"expert_scale"}), seed=7),
    )


@cache
def norm_panel(tokens: int) -> tuple[Problem, ...]:
    """Layers with a norm after each expert."""
    base = Problem(tokens, 5, 17, 16, NORMED, post_expert_norm=True, down_bias=True, seed=1)
    tiny = replace(NORMED, post_expert_norm_eps=1e-8)
    return base, replace(base, dtype="bfloat16", bias_dtype="bfloat16", config=tiny, down_rank=3, seed=2)


def rejected_by(executor: executors.Executor, problem: Problem) -> str:
    """The clause that the executor breaks on this problem, or ""."""
    try:
        check_problem(executor, problem)
        check_repeatable(executor, problem)
    except ConformanceError as error:
        return error.clause
    return ""


def decodes_wrongly(executor: executors.Executor, quant_type: str, nested: str, dtype: str) -> bool:
    """Whether a decoded number differs from the specification's."""
    try:
        check_every_code(executor, quant_type, nested, dtype)
    except ConformanceError:
        return True
    return False


def overflows(executor: executors.Executor, case: str, kind: str) -> bool:
    """Whether a result differs from the specification's."""
    try:
        check_range(executor, case, kind)
    except ConformanceError:
        return True
    return False


def mutants_to_kill(name: str) -> list[str]:
    """All mutants for dense weights; for 4 bits only those of code that is not shared."""
    every = sorted(mutants(executors.get(name)))
    return (
        [m for m in every if m in PACKED_KINDS or "adapter" in m or m in RANGE_MUTANTS]
        if name == "grouped_nf4"
        else every
    )


def each_mutant() -> list[Any]:
    """Of grouped_mm every night: they are those of native."""
    return [
        pytest.param(name, mutant, marks=[pytest.mark.nightly] if name == "grouped_mm" else [])
        for name in EXECUTORS
        for mutant in mutants_to_kill(name)
    ]


@pytest.mark.parametrize(("name", "mutant"), each_mutant())
def test_mutant_is_rejected(name: str, mutant: str) -> None:
    wrong = mutants(executors.get(name))[mutant]
    if mutant in EXACT:
        assert any(decodes_wrongly(wrong, *form) for form in EXACT[mutant])
        return
    if mutant in SUMS:
        with pytest.raises(ConformanceError, match=SUMS[mutant]):
            check_exact(wrong, SUMS[mutant], "bfloat16")
        return
    if mutant in RANGE_MUTANTS:
        kinds = sorted(wrong.capabilities.weights)
        assert any(overflows(wrong, case, kind) for kind, case in product(kinds, RANGES))
        return
    if mutant in SECOND_MUTANTS:
        with pytest.raises(ConformanceError, match="breaks D1: the second derivative in"):
            check_second_derivatives(wrong)
        return
    misread, panel_of = PACKED_KINDS.get(mutant), partial(panel, name)
    if mutant in MIXED_MUTANTS:
        panel_of = mixed_panel
    places = [place for place, p in enumerate(panel_of(FEW)) if misread is None or misread & set(p.kinds)]
    places.sort(key=lambda place: panel_of(FEW)[place].post_expert_norm != mutant.startswith("norm_"))
    for tokens in (FEW, MANY):
        killers = (place for place in places if rejected_by(wrong, panel_of(tokens)[place]))
        killer = next(killers, None)
        assert killer is not None, f"{mutant} of {name} survives at T={tokens}"
        places.sort(key=lambda place, first=killer: place != first)  # what killed it once is tried first


def honest_cases() -> list[tuple[str, str, int]]:
    """Every variant of every executor; grouped_nf4 shares with the others what many tokens could show."""
    return [
        (name, variant, tokens)
        for name in EXECUTORS
        for variant in sorted(honest_variants(executors.get(name)))
        for tokens in ((FEW, MANY) if name == "native" else (FEW,))
    ]


@pytest.mark.parametrize(("name", "variant", "tokens"), honest_cases())
def test_honest_variant_is_accepted(name: str, variant: str, tokens: int) -> None:
    honest = honest_variants(executors.get(name))[variant]
    for problem in panel(name, tokens):
        check_problem(honest, problem)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_one_percent_is_seen_in_bf16(tokens: int) -> None:
    """The gain catches a systematic error far below the size of one rounding per element."""
    problem = replace(dense_panel(tokens)[1], logits="random")
    with pytest.raises(ConformanceError):
        check_problem(mutants(executors.get("native"))["one_percent_more"], problem)


def test_panel_leaves_experts_empty() -> None:
    """Without empty experts no stale gradient could show."""
    from moe_ref.conformance.problems.build import build

    for tokens in (FEW, MANY):
        problem = dense_panel(tokens)[10]
        used = set(build(problem).topk_ids.ravel().tolist())
        assert len(used) < problem.experts
