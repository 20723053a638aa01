"""The conformance suite, which every executor must pass.

Run it on an installed package, from anywhere::

    pytest --pyargs moe_ref.conformance.suite --executor native --executor mine

or collect it from your own test file with ``from moe_ref.conformance.suite import *``. The pytest plugin provides the
fixtures ``judge``, ``executor`` and ``conformance_device``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_ref.conformance import profiles
from moe_ref.conformance.citizen import BEHAVIOURS, check_citizen
from moe_ref.conformance.judgement.checks import applicable, check_problem, check_repeatable
from moe_ref.conformance.judgement.errors import check_errors, check_undeclared_weights
from moe_ref.conformance.judgement.exact import CASES, check_exact
from moe_ref.conformance.judgement.exact_decode import check_every_code
from moe_ref.conformance.judgement.invariance import check_batch_invariance
from moe_ref.conformance.judgement.laws import LAWS, check_law, not_judged
from moe_ref.conformance.judgement.ranges import RANGES, check_range
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.judgement.second_derivatives import check_second_derivatives
from moe_ref.conformance.problems import pinned
from moe_ref.conformance.problems.declared import fitted, in_declared_dtype, undeclared
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import WEIGHTS, problems_for, problems_past_range
from moe_ref.types import QuantType
from moe_ref.validation import DECODED_DTYPES, FLOAT_DTYPES

if TYPE_CHECKING:
    from moe_ref.conformance.reporting.judge import Judge

PROFILE = profiles.current()
LAW_PROFILE = settings(PROFILE, max_examples=PROFILE.max_examples // 5)  # for each of six laws, and for one clause
PINNED = pinned.SMALL if PROFILE is profiles.PROFILES["quick"] else pinned.ALL

__all__ = [
    "test_bad_input_is_refused_in_one_line",
    "test_batch_invariance",
    "test_citizen",
    "test_every_code",
    "test_exact_cases",
    "test_laws",
    "test_matches_specification",
    "test_past_the_range",
    "test_pinned_problems",
    "test_ranges",
    "test_repeatable",
    "test_second_derivatives",
    "test_undeclared_weights_are_refused",
]


@PROFILE
@given(data=st.data())
def test_matches_specification(judge: Judge, data: st.DataObject) -> None:
    """Routing, output and all gradients lie within error bars; NaN stays where it belongs; inputs stay unchanged.

    T1, T2; R1, R2, R3, R4, R5, R6, R7, R9; G1; E1, E2, E3, E4, E6, E8; C1, C3; D1, D2, D3.
    """
    judge(check_problem, data.draw(problems_for(judge.executor), label="problem"))


@pytest.mark.parametrize(
    "problem", PINNED, ids=lambda p: f"T{p.tokens}-E{p.experts}-{p.dtype}-{'-'.join(dict.fromkeys(p.kinds))}"
)
def test_pinned_problems(judge: Judge, problem: Problem) -> None:
    """Many tokens, sizes of real layers, numbers past fp16's range, and every bug that was found (E3, E7, R4)."""
    able = judge.executor.capabilities
    form = fitted(in_declared_dtype(problem, able), able)
    problem = replace(form, config=problem.config) if problem.powers else form  # about an activation's numbers
    lacking = undeclared(problem, able)
    _skip_if(lacking and f"{judge.executor.name} does not declare {lacking}")
    judge(check_problem, problem)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("case", RANGES)
def test_ranges(judge: Judge, case: str, kind: str) -> None:
    """Numbers that pass fp16's range on the way, site by site, still give exact results within the range (E7)."""
    _skip_if(judge(check_range, case, kind))


@LAW_PROFILE
@given(data=st.data())
def test_past_the_range(judge: Judge, data: st.DataObject) -> None:
    """E7: nothing overflows in fp16 on the way to results within its range."""
    if "float16" not in judge.executor.capabilities.dtypes:
        pytest.skip(f"{judge.executor.name} does not declare float16")
    problem = applicable(judge.executor, data.draw(problems_past_range(judge.executor), label="problem"))
    assume(reference(problem).within(problem))
    judge(check_problem, problem)


@pytest.mark.parametrize("law", LAWS)
@LAW_PROFILE
@given(data=st.data())
def test_laws(judge: Judge, law: str, data: st.DataObject) -> None:
    """Metamorphic laws: permute tokens, relabel experts, split the batch, scale weights, add a slot, add an expert.

    G1, R7, D2, C1.
    """
    _skip_if(not_judged(judge.executor, law))
    assume(judge(check_law, data.draw(problems_for(judge.executor), label="problem"), law) is not False)


@PROFILE
@given(data=st.data())
def test_repeatable(judge: Judge, data: st.DataObject) -> None:
    """C1: runs are bitwise equal, forward and backward."""
    judge(check_repeatable, data.draw(problems_for(judge.executor), label="problem"))


@PROFILE
@given(data=st.data())
def test_batch_invariance(judge: Judge, data: st.DataObject) -> None:
    """C2: if the executor declares it, no bit of a token's output depends on other tokens."""
    if not judge.executor.capabilities.batch_invariant:
        pytest.skip(f"{judge.executor.name} does not declare batch invariance")
    judge(check_batch_invariance, data.draw(problems_for(judge.executor), label="problem"))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_exact_cases(judge: Judge, case: str, dtype: str) -> None:
    """Where every step is representable, the result is exact (E1, E2)."""
    _skip_if(judge(check_exact, case, dtype))


@pytest.mark.parametrize("dtype", DECODED_DTYPES)
@pytest.mark.parametrize(
    ("quant_type", "nested"), [*product(get_args(QuantType), ("", "one", "per expert")), ("mxfp4", "")]
)
def test_every_code(judge: Judge, quant_type: str, nested: str, dtype: str) -> None:
    """4-bit weights are decoded to the last bit, however the products round (Q1, Q2, Q3, Q5, M1)."""
    _skip_if(judge(check_every_code, quant_type, nested, dtype))


def test_bad_input_is_refused_in_one_line(judge: Judge) -> None:
    """The executor raises a ValueError or TypeError of one line, which names the argument and its value (T1, R8)."""
    judge(check_errors)


def test_undeclared_weights_are_refused(judge: Judge) -> None:
    """Undeclared kinds of projections, or pairs of kinds, raise Unsupported and are never taken silently."""
    judge(check_undeclared_weights)


def test_second_derivatives(judge: Judge) -> None:
    """D1: a second derivative is right, or an error, and never silently wrong."""
    _skip_if(judge(check_second_derivatives))


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_citizen(judge: Judge, behaviour: str) -> None:
    """Hooks, modes, threads, processes and views of torch change no bit: a good citizen's behaviours (C1, D1, E4)."""
    _skip_if(judge(check_citizen, behaviour))


def _skip_if(lacking: str | None) -> None:
    """Skips with the reason, if there is one."""
    if lacking:
        pytest.skip(lacking)
