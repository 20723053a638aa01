"""The kernels of ``triton`` on dense weights, judged as every executor is: on a GPU, or in Triton's interpreter.

The interpreter takes milliseconds for a step of a tile, so fewer problems are drawn than for other executors.
"""

from dataclasses import replace
from functools import partial
from itertools import cycle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import executors
from moe_ref import MoEConfig
from moe_ref.conformance import profiles
from moe_ref.conformance.citizen import BEHAVIOURS, check_citizen
from moe_ref.conformance.judgement.checks import applicable, check_problem, check_repeatable
from moe_ref.conformance.judgement.errors import check_errors, check_undeclared_weights
from moe_ref.conformance.judgement.exact import CASES, check_exact
from moe_ref.conformance.judgement.invariance import check_batch_invariance
from moe_ref.conformance.judgement.laws import LAWS, check_law
from moe_ref.conformance.judgement.ranges import RANGES, check_range
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.judgement.second_derivatives import check_second_derivatives
from moe_ref.conformance.problems import pinned
from moe_ref.conformance.problems.declared import undeclared, without_undeclared
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems, problems_past_range

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_NIGHT = profiles.current() is profiles.PROFILES["nightly"]
# A thousand rows take an interpreter a minute, in all forms.
EXACT = [case for case in CASES if DEVICE == "cuda" or EVERY_NIGHT or not case.startswith("plain_rows")]
TRITON = executors.get("triton")
PROFILE = profiles.current()
DTYPES = ("float32", "bfloat16", "float16")
MOST_TOKENS = 10**6 if torch.cuda.is_available() else 256
WIDE = MoEConfig(2, limit=1.0, up_offset=1.0, gate_up_layout="interleaved")

# These features must not depend on chance: each is tested in one dtype, whatever the seed.
ALWAYS = {
    "empty experts": Problem(5, 33, 16, 8, MoEConfig(1)),
    "ties": Problem(17, 33, 16, 8, MoEConfig(8, scoring="sigmoid"), logits="ties"),
    "odd sizes": Problem(33, 5, 50, 17, MoEConfig(3, activation="geglu"), gate_up_bias=True, down_bias=True),
    "broken rows": Problem(9, 5, 7, 17, WIDE, broken_logits=3, broken_x=1, down_bias=True),
    "transposed weights": Problem(33, 5, 64, 50, WIDE, weights_layout="transposed", gate_up_bias=True),
    "sliced everything": Problem(
        12,
        5,
        17,
        33,
        MoEConfig(2),
        x_layout="sliced",
        weights_layout="sliced",
        routing_layout="sliced",
        dy_layout="sliced",
        down_bias=True,
    ),
    "empty slots": Problem(
        16, 4, 32, 16, MoEConfig(2, scale_input=True), entry="experts", empty_slots=True, routing_layout="sliced"
    ),
    "many slots": Problem(300, 5, 8, 8, MoEConfig(4, activation="relu2"), entry="experts", cut_points=True),
    "adapters": Problem(17, 5, 33, 20, WIDE, gate_up_rank=3, down_rank=17, gate_up_bias=True, down_bias=True),
    "frozen experts": Problem(
        17, 5, 32, 16, MoEConfig(2), gate_up_rank=4, down_rank=4, frozen=frozenset({"gate_up_proj", "down_proj"})
    ),
}


def dense(executor: executors.Executor) -> st.SearchStrategy[Problem]:
    """Problems within an executor's declared dtypes; 4 bits are judged in test_triton_packed.py."""
    drawn = problems(executor.capabilities.dtypes, weights=("dense",))
    return drawn.map(partial(without_undeclared, able=executor.capabilities))


def drawn(share: int) -> settings:
    """The profile with 1 / ``share`` of its examples."""
    return settings(PROFILE, max_examples=max(1, PROFILE.max_examples // share))


@pytest.mark.parametrize(("name", "dtype"), list(zip(ALWAYS, cycle(DTYPES), strict=False)))
def test_always(name: str, dtype: str) -> None:
    check_problem(TRITON, replace(ALWAYS[name], dtype=dtype), DEVICE)


@drawn(5)
@given(st.data())
def test_matches_specification(data: st.DataObject) -> None:
    check_problem(TRITON, data.draw(dense(TRITON), label="problem"), DEVICE)


@drawn(33)
@given(st.data())
def test_repeatable(data: st.DataObject) -> None:
    check_repeatable(TRITON, data.draw(dense(TRITON), label="problem"), DEVICE)


@pytest.mark.parametrize("law", LAWS if EVERY_NIGHT else [*LAWS][::2])  # test_triton_packed has the others
@drawn(25)
@given(data=st.data())
def test_laws(law: str, data: st.DataObject) -> None:
    assume(check_law(TRITON, data.draw(dense(TRITON), label="problem"), law, DEVICE))


@drawn(16)
@given(st.data())
def test_batch_invariance(data: st.DataObject) -> None:
    """C2, with the option."""
    invariant = executors.get("triton", batch_invariant=True)
    assert check_batch_invariance(invariant, data.draw(dense(invariant), label="problem"), DEVICE)


@pytest.mark.parametrize("case", RANGES)
def test_ranges(case: str) -> None:
    """E7, in dense weights."""
    lacking = "triton does not declare a norm after each expert" if RANGES[case].norm else ""
    assert check_range(TRITON, case, "dense", DEVICE) == lacking


@drawn(16)
@given(st.data())
def test_past_the_range(data: st.DataObject) -> None:
    """E7, in any weights."""
    problem = applicable(TRITON, data.draw(problems_past_range(TRITON), label="problem"))
    assume(reference(problem).within(problem))
    check_problem(TRITON, problem, DEVICE)


@pytest.mark.parametrize("problem", pinned.PAST_RANGE, ids=lambda p: f"T{p.tokens}-{p.quant_type}-{p.seed}")
def test_pinned_problems_past_the_range(problem: Problem) -> None:
    lacking = undeclared(problem, TRITON.capabilities)
    if problem.tokens > MOST_TOKENS or lacking:
        pytest.skip(lacking or "too many tokens for the interpreter")
    check_problem(TRITON, problem, DEVICE)


@pytest.mark.parametrize("problem", pinned.EXAMPLES, ids=lambda p: f"T{p.tokens}-E{p.experts}")
def test_pinned_problems(problem: Problem) -> None:
    lacking = undeclared(problem, TRITON.capabilities)
    if lacking:
        pytest.skip(lacking)
    check_problem(TRITON, problem, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EXACT)
def test_exact_cases(case: str, dtype: str) -> None:
    assert check_exact(TRITON, case, dtype, DEVICE) == ""


def test_second_derivatives_are_refused() -> None:
    check_second_derivatives(TRITON, DEVICE)


def test_bad_input_is_refused_in_one_line() -> None:
    check_errors(TRITON, DEVICE)
    check_undeclared_weights(TRITON, DEVICE)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_citizen(behaviour: str) -> None:
    lacking = check_citizen(TRITON, behaviour, DEVICE)
    if lacking:
        pytest.skip(lacking)
