"""The conformance suite, which every executor must pass.

Run it on an installed package, from anywhere::

    pytest --pyargs moe_ref.conformance.suite --executor native --executor mine

or collect it from your own test file with ``from moe_ref.conformance.suite import *``. The pytest plugin provides the
fixtures ``executor`` and ``conformance_device``.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_ref.conformance import profiles
from moe_ref.conformance.citizen import BEHAVIOURS, check_citizen
from moe_ref.conformance.judgement.checks import applicable, check_problem, check_repeatable
from moe_ref.conformance.judgement.errors import check_errors, check_no_double_backward, check_undeclared_weights
from moe_ref.conformance.judgement.exact import CASES, check_exact
from moe_ref.conformance.judgement.exact_decode import check_every_code
from moe_ref.conformance.judgement.invariance import check_batch_invariance
from moe_ref.conformance.judgement.laws import LAWS, check_law
from moe_ref.conformance.judgement.ranges import RANGES, check_range
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.problems import pinned
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import WEIGHTS, problems_for, problems_past_range, undeclared
from moe_ref.types import QuantType
from moe_ref.validation import DECODED_DTYPES, FLOAT_DTYPES

if TYPE_CHECKING:
    from executors import Executor

PROFILE = profiles.current()
LAW_PROFILE = settings(PROFILE, max_examples=PROFILE.max_examples // 5)  # for each of six laws, and for one clause
PINNED = pinned.EXAMPLES + pinned.LARGE + pinned.PACKED + pinned.PAST_RANGE

__all__ = [
    "test_bad_input_is_refused_in_one_line",
    "test_batch_invariance",
    "test_citizen",
    "test_double_backward_is_refused",
    "test_every_code",
    "test_exact_cases",
    "test_laws",
    "test_matches_specification",
    "test_past_the_range",
    "test_pinned_problems",
    "test_ranges",
    "test_repeatable",
    "test_undeclared_weights_are_refused",
]


@PROFILE
@given(data=st.data())
def test_matches_specification(executor: Executor, conformance_device: str, data: st.DataObject) -> None:
    """Routing, output and all gradients lie within error bars; NaN stays where it belongs; inputs stay unchanged.

    T1, T2; R1, R2, R3, R4, R5, R6, R7, R9; G1; E1, E2, E3, E4, E6, E8; C1, C3; D1, D2, D3.
    """
    check_problem(executor, data.draw(problems_for(executor), label="problem"), conformance_device)


@pytest.mark.parametrize(
    "problem", PINNED, ids=lambda p: f"T{p.tokens}-E{p.experts}-{p.dtype}-{'-'.join(dict.fromkeys(p.kinds))}"
)
def test_pinned_problems(executor: Executor, conformance_device: str, problem: Problem) -> None:
    """Many tokens, sizes of real layers, numbers past fp16's range, and every bug that was found (E3, E7, R4)."""
    _skip_undeclared(executor, problem)
    check_problem(executor, problem, conformance_device)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("case", RANGES)
def test_ranges(executor: Executor, conformance_device: str, case: str, kind: str) -> None:
    """Numbers that pass fp16's range on the way, site by site, still give exact results within the range (E7)."""
    _skip_if(check_range(executor, case, kind, conformance_device))


@LAW_PROFILE
@given(data=st.data())
def test_past_the_range(executor: Executor, conformance_device: str, data: st.DataObject) -> None:
    """E7: nothing overflows in fp16 on the way to results within its range."""
    if "float16" not in executor.capabilities.dtypes:
        pytest.skip(f"{executor.name} does not declare float16")
    problem = applicable(executor, data.draw(problems_past_range(executor), label="problem"))
    assume(reference(problem).within(problem))
    check_problem(executor, problem, conformance_device)


@pytest.mark.parametrize("law", LAWS)
@LAW_PROFILE
@given(data=st.data())
def test_laws(executor: Executor, conformance_device: str, law: str, data: st.DataObject) -> None:
    """Metamorphic laws: permute tokens, relabel experts, split the batch, scale weights, add a slot, add an expert.

    G1, R7, D2, C1.
    """
    assume(check_law(executor, data.draw(problems_for(executor), label="problem"), law, conformance_device))


@PROFILE
@given(data=st.data())
def test_repeatable(executor: Executor, conformance_device: str, data: st.DataObject) -> None:
    """C1: runs are bitwise equal, forward and backward."""
    check_repeatable(executor, data.draw(problems_for(executor), label="problem"), conformance_device)


@PROFILE
@given(data=st.data())
def test_batch_invariance(executor: Executor, conformance_device: str, data: st.DataObject) -> None:
    """C2: if the executor declares it, no bit of a token's output depends on other tokens."""
    if not executor.capabilities.batch_invariant:
        pytest.skip(f"{executor.name} does not declare batch invariance")
    check_batch_invariance(executor, data.draw(problems_for(executor), label="problem"), conformance_device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_exact_cases(executor: Executor, conformance_device: str, case: str, dtype: str) -> None:
    """Where every step is representable, the result is exact (E1, E2)."""
    _skip_if(check_exact(executor, case, dtype, conformance_device))


@pytest.mark.parametrize("dtype", DECODED_DTYPES)
@pytest.mark.parametrize(
    ("quant_type", "nested"), [*product(get_args(QuantType), ("", "one", "per expert")), ("mxfp4", "")]
)
def test_every_code(executor: Executor, conformance_device: str, quant_type: str, nested: str, dtype: str) -> None:
    """4-bit weights are decoded to the last bit, however the products round (Q1, Q2, Q3, Q5, M1)."""
    _skip_if(check_every_code(executor, quant_type, nested, dtype, conformance_device))


def test_bad_input_is_refused_in_one_line(executor: Executor, conformance_device: str) -> None:
    """The executor raises a ValueError or TypeError with the argument, its value, and what is allowed (T1, R8)."""
    check_errors(executor, conformance_device)


def test_undeclared_weights_are_refused(executor: Executor, conformance_device: str) -> None:
    """Undeclared kinds of projections, or pairs of kinds, raise Unsupported and are never taken silently."""
    check_undeclared_weights(executor, conformance_device)


def test_double_backward_is_refused(executor: Executor, conformance_device: str) -> None:
    """D1: a second derivative is an error, never a silent zero."""
    check_no_double_backward(executor, conformance_device)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_citizen(executor: Executor, conformance_device: str, behaviour: str) -> None:
    """Hooks, modes, threads, processes and views of torch change no bit: a good citizen's behaviours (C1, D1, E4)."""
    _skip_if(check_citizen(executor, behaviour, conformance_device))


def _skip_if(lacking: str) -> None:
    """Skips with the reason, if there is one."""
    if lacking:
        pytest.skip(lacking)


def _skip_undeclared(executor: Executor, problem: Problem) -> None:
    lacking = undeclared(problem, executor.capabilities)
    if lacking:
        pytest.skip(f"{executor.name} does not declare {lacking}")
