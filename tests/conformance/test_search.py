"""Failures are told soon, once for each cause, and made simpler only as long as that is worth it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import executors
from moe_ref.conformance import profiles, suite
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem
from moe_ref.conformance.judgement.gates import short
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.problems.strategies import problems_for
from moe_ref.conformance.reporting import order
from moe_ref.conformance.reporting.judge import Judge
from moe_ref.conformance.reporting.ledger import failures_of
from moe_ref.conformance.reporting.search import KNOWN, Search, cause
from plugin_runs import install, run_pytest

WRONG = mutants(executors.get("native"))["one_percent_more"]


def searched(judge: Judge, test: str, seen: list[str]) -> BaseException:
    """What a property test of a judge ends with, and all problems that it judged after the first that failed."""

    def check(executor: Any, problem: Any, device: str) -> Any:
        if judge.search._failed:
            seen.append(repr(problem))
        return check_problem(executor, problem, device)

    @settings(profiles.PROFILES["quick"], max_examples=30)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        judge(check, data.draw(problems_for(judge.executor)))

    judge.start(test)
    with pytest.raises(ConformanceError) as caught:
        run()
    return caught.value


def test_a_failure_is_made_simpler_up_to_the_limit_and_is_still_one() -> None:
    for limit in (0, 5, 400):
        seen: list[str] = []
        search = Search(limit)
        error = searched(Judge("wrong", WRONG, "cpu", search=search), "test_a", seen)
        (told,) = failures_of(error)
        for_causes = limit // 4 * len(search._causes)  # that came up on the way
        assert len(set(seen)) <= 1 + limit + for_causes  # the one that failed is judged again
        assert told[1][0].breaks == ("C1", "E1", "E2")
    assert "tokens=1, experts=1, hidden=1, intermediate=1" in str(error)


def test_what_was_made_simpler_is_not_made_so_again() -> None:
    judge, first, second = Judge("wrong", WRONG, "cpu", search=Search(400)), list[str](), list[str]()
    searched(judge, "test_a", first)
    searched(judge, "test_b", second)
    assert len(set(second)) <= KNOWN + 1 < len(set(first))


def test_another_cause_is_made_simpler() -> None:
    search = Search(100, known={"E1 wrong values"})
    search.start()
    search.failed("a", {"E1 wrong values"})
    assert sum(search.wants(str(place)) for place in range(50)) == KNOWN
    search.failed("b", {"E1 NaN or infinity"})
    assert sum(search.wants(str(place)) for place in range(50)) == 25
    assert search.wants("a")
    assert search.wants("b")


def test_a_single_failure_makes_nothing_known() -> None:
    """A pinned problem may be large, and what it breaks is still to be shown on a small one."""
    search = Search(100)
    for _ in range(2):
        search.start()
        search.failed("a", {"E1 wrong values"})
        assert sum(search.wants(str(place)) for place in range(200)) == 100


@pytest.mark.parametrize(
    ("says", "tensor", "told"),
    [
        ("y(0, 0)=1.2, but must be 3 +- 0.1: max z 18.0, limit 6", "y", "wrong values"),
        ("x: rms z=1.20, but must be at most 1, over 4096 elements", "x", "wrong values"),
        ("y(0, 0)=256.0, but must be exactly 258.0", "y", "wrong values"),
        ("y(3, 1)=nan, but must be 0.5", "y", "NaN or infinity"),
        ("y(3, 1)=1, but must be inf", "y", "NaN or infinity"),
        ("y is float32, but must be bfloat16", "y", "is float32 but must be bfloat16"),
        ("no gradient for x; only where torch's deterministic mode is off", "x", "no gradient for"),
        ("x no array: raises AttributeError('a'), but must raise a TypeError", "", "raises AttributeError"),
        ("CUDA error: code 700 (illegal address) at 0x7f", "", "CUDA error code at"),
    ],
)
def test_causes_are_told_without_numbers(says: str, tensor: str, told: str) -> None:
    assert cause(says, tensor) == told


def test_a_large_z_is_short() -> None:
    assert [short(z) for z in (6.52, 9999.0, 8228003.2, -1e46)] == ["6.5", "9999.0", "8.23e+06", "-1e+46"]


def test_the_order_names_all_tests() -> None:
    assert {*order.ORDER} == {*suite.__all__}


def test_cheap_tests_come_first_and_others_keep_their_places() -> None:
    def item(name: str, executor: str, **params: Any) -> Any:
        function = SimpleNamespace(__module__=order.SUITE)
        callspec = SimpleNamespace(params={"executor_name": executor, **params})
        return SimpleNamespace(function=function, originalname=name, callspec=callspec)

    large, small, tiny = (SimpleNamespace(tokens=tokens, hidden=32) for tokens in (2048, 9, 0))
    other = SimpleNamespace()
    items = [
        item("test_laws", "a"),
        item("test_pinned_problems", "a", problem=large),
        other,
        item("test_pinned_problems", "a", problem=small),
        item("test_laws", "b"),
        item("test_exact_cases", "b"),
        item("test_exact_cases", "a"),
        item("test_pinned_problems", "a", problem=tiny),
    ]
    laws, pinned_large, _, pinned_small, laws_b, exact_b, exact, pinned_tiny = items
    order.cheap_first(items)
    assert items == [pinned_tiny, exact, other, pinned_small, laws, pinned_large, exact_b, laws_b]


SPOILT = """
import executors
from moe_ref.conformance.wrapped import Wrapped

def slots(inner, x, ids, w, weights):
    if not len(x):
        raise RuntimeError("the grid has 0 blocks")
    return inner.experts(x, topk_ids=ids, topk_weights=w * 1.01, weights=weights)

def spoilt():
    return Wrapped("spoilt", executors.get("native"), slots=slots)
"""


def test_two_failures_of_one_test_are_told_without_a_group(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    install(outside, "spoilt", "spoilt:spoilt", SPOILT)
    which = "--executor", "spoilt", "-k", "matches_specification or (pinned and T0)", "--hypothesis-profile", "quick"
    ran = run_pytest(outside, "--pyargs", "moe_ref.conformance.suite", *which)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert "ExceptionGroup" not in ran.stdout
    assert "another failure" in ran.stdout
    assert "Capabilities(" not in ran.stdout
    pinned = re.search(r"_ test_pinned_problems\[spoilt-T0.*?_ test_matches", ran.stdout, re.DOTALL)
    assert pinned is not None
    assert re.search(r"E +again: .*check_problem\(get\('spoilt'\), Problem\(tokens=0, ", pinned[0])
    assert re.search(r"^  raises RuntimeError \(the grid has blocks\): \d+ failures$", ran.stdout, re.MULTILINE)
    smallest = r"Problem\(tokens=1, experts=1, hidden=1, intermediate=1, config=MoEConfig\(top_k=1\)\)"
    assert re.search(rf"^  breaks C1, E1, E2 \(wrong values\).*\n.*\n    again: .*{smallest}", ran.stdout, re.MULTILINE)
