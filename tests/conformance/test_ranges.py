"""Clause E7: the suite's cases are as described, and every overflow is seen."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

import executors
from executors import Capabilities
from executors.native import Native
from moe_ref._typing import Array
from moe_ref.conformance.honest import honest_variants
from moe_ref.conformance.judgement.call import to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, applicable, check_problem
from moe_ref.conformance.judgement.ranges import DTYPE, PLAIN, RANGES, Range, case_of, check_range, exact_results
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.mutants._registry import RANGE_MUTANTS
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.pinned import PAST_RANGE
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import SCALED_INPUT, SCALED_OUTPUT
from moe_ref.layer import layer_vjp
from moe_ref.numerics import FORMATS, Exact, Nearest, round_to_nearest
from moe_ref.types import MoEConfig

LARGEST = FORMATS[DTYPE].max


class Largest(Exact):
    """No rounding; records the largest number at each site."""

    def __init__(self) -> None:
        self.of_site: dict[str, float] = {}
        self.representable = True

    def store(self, site: str, value: Array) -> Array:
        self.of_site[site] = max(self.of_site.get(site, 0.0), float(np.abs(value).max()))
        self.representable &= bool((value == round_to_nearest(value, DTYPE, overflows=False)).all())
        return value


FORMS = [*RANGES.values(), *PLAIN.values()]


@pytest.mark.parametrize("scale", FORMS, ids=str)
def test_every_site_passes_the_range_and_no_result_does(scale: Range) -> None:
    """E7: and each step is representable but for its size."""
    _, arrays = case_of(scale)
    largest = Largest()
    results = exact_results(arrays, largest)
    inputs = [arrays.x, arrays.dy, *arrays.weights.parameters().values()]
    past = {site for site, size in largest.of_site.items() if size > LARGEST}
    assert set(scale.sites) <= past
    assert largest.representable
    assert all(np.array_equal(value, round_to_nearest(value, DTYPE)) for value in inputs)
    assert all(np.abs(results[name]).max() < LARGEST for name in results if name != "topk_weights")
    assert all(np.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize("scale", FORMS, ids=str)
def test_rounding_that_overflows_is_seen_in_every_case(scale: Range) -> None:
    """E7: at each of its sites alone."""
    _, arrays = case_of(scale)
    for site in scale.sites:
        with np.errstate(invalid="ignore"):
            results = exact_results(arrays, Nearest(DTYPE, overflows=frozenset({site})))
        assert not all(np.isfinite(value).all() for value in results.values()), site


HONEST = [("native", "fp32_throughout", "dense"), ("native", "rounded_at_every_site", "dense")]
HONEST += [("grouped_nf4", "rounded_at_every_site", kind) for kind in ("nf4", "fp4", "mxfp4")]


@pytest.mark.parametrize(("name", "variant", "kind"), HONEST)
def test_honest_variants_are_accepted(name: str, variant: str, kind: str) -> None:
    """E7: and every format holds the weights exactly."""
    honest = honest_variants(executors.get(name))[variant]
    for case in RANGES:
        assert check_range(honest, case, kind) == ""


@pytest.mark.parametrize("mutant", RANGE_MUTANTS)
def test_what_overflows_is_rejected(mutant: str) -> None:
    """E7: every site has a case that shows it."""
    wrong = mutants(honest_variants(executors.get("native"))["fp32_throughout"])[mutant]
    assert any(is_rejected(wrong, case) for case in RANGES)


def is_rejected(executor: executors.Executor, case: str) -> bool:
    try:
        check_range(executor, case, "dense")
    except ConformanceError as error:
        return error.clause == "E7"
    return False


@pytest.mark.parametrize("problem", PAST_RANGE, ids=lambda p: str(p.seed))
def test_pinned_problems_pass_the_range_inside_alone(problem: Problem) -> None:
    """E7: with all of the specification's error bars."""
    problem = applicable(executors.get("grouped_nf4" if problem.quant_type else "native"), problem)
    arrays = build(problem)
    largest = Largest()
    layer_vjp(
        arrays.x,
        arrays.router_logits,
        arrays.topk_ids,
        arrays.topk_weights,
        arrays.weights,
        arrays.dy,
        largest,
    )
    assert any(size > LARGEST for size in largest.of_site.values())
    assert reference(problem).within(problem)


@pytest.mark.parametrize("powers", [(), *SCALED_INPUT, *SCALED_OUTPUT, (("gate", -9), ("up", -9), ("x[0]", -9))])
def test_numbers_with_powers_are_representable(powers: tuple[tuple[str, int], ...]) -> None:
    """E7: small numbers are rounded to fp16's subnormal numbers."""
    config = MoEConfig(2)
    problem = Problem(9, 3, 32, 16, config, DTYPE, entry="experts", gate_up_rank=3, lora_dtype=DTYPE, powers=powers)
    arrays = build(problem)
    inputs = to_torch(problem, arrays)
    given = {"x": arrays.x, "topk_weights": arrays.topk_weights, **arrays.weights.parameters()}
    assert np.array_equal(inputs.dy.double().numpy(), arrays.dy)
    for name, tensor in inputs.tensors().items():
        assert np.array_equal(tensor.detach().double().numpy(), given[name]), name


@pytest.mark.parametrize("problem", PAST_RANGE, ids=lambda p: str(p.seed))
def test_pinned_problems_are_held_by_honest_variants(problem: Problem) -> None:
    """E7: with error bars that do not include overflow."""
    inner = executors.get("grouped_nf4" if problem.quant_type else "native")
    for name, honest in honest_variants(inner).items():
        if name in ("fp32_throughout", "rounded_at_every_site"):
            check_problem(honest, problem)


@dataclass(frozen=True)
class PlainSwiGLU(Native):
    name: ClassVar[str] = "plain_swiglu"
    capabilities: ClassVar[Capabilities] = replace(
        Native().capabilities,
        activations=frozenset({"swiglu"}),
        alphas=frozenset({1.0}),
        limits=frozenset({None}),
        up_offsets=frozenset({0.0}),
        late_clamp=False,
        scale_input=False,
    )


@pytest.mark.parametrize("case", PLAIN)
def test_plain_swiglu_has_its_own_form(case: str) -> None:
    """E7: it is accepted, and an overflow at each of its sites is seen."""
    plain = PlainSwiGLU()
    assert check_range(plain, case, "dense") == ""
    for site in PLAIN[case].sites:
        overflow = "dx_of_slots_overflows" if site == "dx_slot" else f"{site}_overflows"
        assert is_rejected(mutants(plain)[overflow], case), site


def test_other_cases_are_left_out_aloud() -> None:
    for case in set(RANGES) - set(PLAIN):
        assert check_range(PlainSwiGLU(), case, "dense").startswith("plain_swiglu does not declare "), case
