"""Results by clause: what is expected to fail, what is saved, what can be pasted, and what is counted."""

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import clauses
import executors
import moe_ref
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem
from moe_ref.conformance.judgement.exact import check_exact
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.problems import pinned
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.reporting import again, expected, ledger, reporter, results, saved, summary
from moe_ref.conformance.reporting.expected import BadExpectationsError, Expected, read_expected
from moe_ref.conformance.reporting.judge import Judge
from moe_ref.types import MoEConfig
from plugin_runs import ONE_PERCENT, install, run_pytest

NATIVE = executors.get("native")
WRONG = mutants(NATIVE)["one_percent_more"]
SMALL = Problem(9, 3, 8, 8, MoEConfig(2), "bfloat16", down_bias=True)
KNOWN = {"clause": "E2", "reason": "issue 1"}


def write(path: Path, *entries: Any, **more: Any) -> Path:
    found = {"format": expected.FORMAT, "executors": {"one_percent": list(entries)}} | more
    path.write_text(json.dumps(found))
    return path


# --- the file of expected failures


def test_a_file_is_read(tmp_path: Path) -> None:
    raises = {"raises": "RuntimeError", "test": "test_laws*", "reason": "issue 2"}
    known = read_expected(write(tmp_path / "known.json", KNOWN | {"tensor": "y", "dtype": "bfloat16"}, raises))
    assert known == (
        Expected("one_percent", "issue 1", "E2", tensor="y", dtype="bfloat16"),
        Expected("one_percent", "issue 2", raises="RuntimeError", test="test_laws*"),
    )
    assert [*map(str, known)] == ["E2 y bfloat16", "raises RuntimeError test_laws*"]


@pytest.mark.parametrize(
    ("entries", "more", "message"),
    [
        ([], {"format": "2"}, "format='2': must be 'moe-ref expected failures 1'"),
        ([], {"executors": []}, r"executors=\[\]: must be an object"),
        ([], {"other": 1}, "must be an object, and all there is beside format"),
        ([3], {}, r"one_percent\[0\]=3: must be an object"),
        ([{"clause": "E2"}], {}, r"\[0\]: reason: must be given"),
        ([{"reason": "r"}], {}, "clause, raises: must be one of them"),
        ([KNOWN | {"raises": "RuntimeError"}], {}, "clause, raises: must be one of them"),
        ([{"raises": "E", "reason": "r", "dtype": "float32"}], {}, "tensor, dtype: must not stand beside raises"),
        ([KNOWN | {"clauses": "E2"}], {}, "'clauses': must be one of reason, clause, raises, tensor, dtype, test"),
        ([KNOWN, KNOWN | {"dtype": ""}], {}, r"\[1\]: dtype='': must be a text that is not empty"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, entries: Any, more: Any, message: str) -> None:
    with pytest.raises(BadExpectationsError, match=message) as caught:
        read_expected(write(tmp_path / "known.json", *entries, **more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"format": 1, "format": 1}', None])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "known.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadExpectationsError, match=r"known\.json: .*must be") as caught:
        read_expected(path)
    assert "\n" not in str(caught.value)


# --- what is expected lets pass nothing else


def test_all_that_is_wrong_with_a_result_is_found() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_problem(WRONG, SMALL)
    assert {fault.tensor for fault in caught.value.faults} >= {"y", "down_proj_bias", "router_logits"}
    assert caught.value.faults[0].tensor == "y"


def test_expected_clauses_pass_and_others_do_not() -> None:
    y = Expected(WRONG.name, "r", "E2", tensor="y")
    judge = Judge("wrong", WRONG, "cpu", [y])
    with pytest.raises(ConformanceError, match="breaks D1") as caught:
        judge(check_problem, SMALL)
    assert all(fault.tensor != "y" for fault in caught.value.faults)
    assert y in judge.met
    judge = Judge("wrong", WRONG, "cpu", [y, Expected(WRONG.name, "r", "D1")])
    assert judge(check_problem, SMALL) is None
    assert {*judge.met} == {*judge.expected}


@pytest.mark.parametrize("narrower", [{"dtype": "float32"}, {"tensor": "x"}, {"test": "test_laws*"}, {"clause": "E3"}])
def test_an_expectation_covers_what_it_says(narrower: dict[str, str]) -> None:
    wide = Expected(WRONG.name, "r", "E2")
    for known, passes in ((wide, True), (replace(wide, **narrower), False)):
        judge = Judge("wrong", WRONG, "cpu", [known, Expected(WRONG.name, "r", "D1")], "test_pinned")
        if passes:
            assert judge(check_problem, SMALL) is None
        else:
            with pytest.raises(ConformanceError):
                judge(check_problem, SMALL)


def test_exceptions_can_be_expected_by_name() -> None:
    def check(_executor: Any, _device: str) -> None:
        raise LookupError("no kernel")

    for name, passes in (("LookupError", True), ("RuntimeError", False)):
        judge = Judge("native", NATIVE, "cpu", [Expected("native", "r", raises=name)])
        if passes:
            assert judge(check) is None
        else:
            with pytest.raises(LookupError):
                judge(check)


# --- failures to run again


@pytest.mark.parametrize(("check", "arguments"), [(check_problem, (SMALL,)), (check_exact, ("long_sums", "float32"))])
def test_a_failure_is_told_as_a_call_to_paste(check: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConformanceError) as caught:
        Judge("wrong", WRONG, "cpu")(check, *arguments)
    (note,) = caught.value.__notes__
    names: dict[str, Any] = {}
    line = note.removeprefix("again: ")
    setup, _, call = line.partition("; ")
    exec(setup, names)
    assert {*again.__all__} <= names.keys()
    names["get"] = lambda name: {"wrong": WRONG}[name]
    with pytest.raises(ConformanceError, match=re.escape(str(caught.value).splitlines()[0])):
        exec(call, names)


SAVED = [*pinned.SMALL[::11], *(p for p in pinned.EXAMPLES if p.broken_logits or p.empty_slots or p.batch)]


@pytest.mark.parametrize("problem", SAVED, ids=range(len(SAVED)))
def test_any_problem_can_be_saved_and_is_judged_from_the_file(tmp_path: Path, problem: Problem) -> None:
    executor = NATIVE if not any(problem.quant_types.values()) else executors.get("grouped_nf4")
    error = ConformanceError(executor, problem, "E2", "planted")
    folder = saved.save_failure(tmp_path, error, "test_pinned_problems[native-T9]")
    assert folder == tmp_path / "pinned-problems-native-t9"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    saved.check_saved(executor, folder)


def test_a_saved_failure_fails_from_the_file_and_is_replaced(tmp_path: Path) -> None:
    for problem in (SMALL, replace(SMALL, seed=1)):
        with pytest.raises(ConformanceError) as caught:
            check_problem(WRONG, problem)
        folder = saved.save_failure(tmp_path, caught.value, "test_pinned_problems[one]")
        with pytest.raises(ConformanceError, match="breaks C1, E1, E2: y"):
            saved.check_saved(WRONG, folder)
    with pytest.raises(ConformanceError) as caught:
        check_exact(WRONG, "many_rows", "bfloat16")
    folder = saved.save_failure(tmp_path, caught.value, "test_exact_cases[one]")
    saved.check_saved(NATIVE, folder)


# --- the summary


def outcome(test: str, outcome: str = "passed", named: tuple[str, ...] = ("E2", "E6"), **more: Any) -> ledger.Outcome:
    return ledger.Outcome("mine", test, named, outcome, **more)


def failure(breaks: str, problem: str = "Problem(tokens=9)") -> ledger.Failure:
    return ledger.Failure((breaks,), f"{breaks} on {problem}", problem, f"again: {problem}", "there")


def told(found: ledger.Ledger, left_out: str = "") -> list[str]:
    return [line.text for line in summary.lines(found, "mine", [summary.Lack("no backward pass", ("D1",))], left_out)]


def test_clauses_are_those_of_the_page() -> None:
    assert {*ledger.CLAUSES} == {*clauses.clauses()}


def test_what_passes_holds_and_the_rest_is_counted() -> None:
    first, second = told(ledger.Ledger((), [outcome("test_a")]))
    assert re.match(r"mine: 2 clauses hold, 1 not applicable, 32 not judged here \(T1, ", first)
    assert second == "mine: no backward pass"


def test_failures_are_grouped_the_smallest_first() -> None:
    one, two = failure("E2", "Problem(tokens=9, experts=3)"), failure("E2")
    lines = told(ledger.Ledger((), [outcome("test_a", "failed", failures=(one,)), outcome("t", failures=(two,))]))
    assert lines[0].startswith("mine: 1 clauses hold, 1 broken, 1 not applicable, ")
    assert lines[1:5] == [
        "  breaks E2: 2 failures",
        "    E2 on Problem(tokens=9)",
        "    again: Problem(tokens=9)",
        "    saved: there",
    ]


def broken(*breaks: str, cause: str = "") -> list[str]:
    """What is told of failures that break these, each in a problem of its own size."""
    found = [
        replace(failure(each, f"Problem(tokens={size})"), cause=cause if each.startswith("the ") else "")
        for size, each in enumerate(breaks, 1)
    ]
    return told(ledger.Ledger((), [outcome("test_a", "failed", failures=tuple(found))]))


def test_what_follows_from_nothing_else_always_has_its_example() -> None:
    behaviours = [f"the behaviour b{place}" for place in range(20)]
    lines = broken(*[f"E{place}" for place in range(9)], *behaviours, *[f"the law l{place}" for place in range(9)])
    assert [line for line in lines if line.startswith("    the behaviour ")] == [
        f"    {each} on Problem(tokens={size})" for size, each in enumerate(behaviours, 10)
    ]
    shown = [line for line in lines if re.match(r"    (E\d|the law)", line)]
    assert len(shown) == 2 * summary.SHOWN
    start = lines.index("  without an example here, which --results FILE has:")
    assert lines[start + 1 : start + 4] == [
        "  breaks E8: 1 failure",
        "  breaks the law l8: 1 failure",
        "mine: no backward pass",
    ]


def test_behaviours_that_meet_an_exception_of_other_tests_follow_from_it() -> None:
    behaviours = [f"the behaviour b{place}" for place in range(20)]
    for others, examples in ((["raises ValueError"], summary.SHOWN), (["raises LookupError"], 20)):
        lines = broken(*others, *behaviours, cause="raises ValueError")
        assert sum(line.startswith("    the behaviour ") for line in lines) == examples
    assert "  and 4 other kinds of failures" not in lines
    many = broken(*[f"the law l{place}" for place in range(summary.SHOWN + summary.NAMED + 4)])
    assert "  and 4 other kinds of failures" in many


def test_failures_beyond_the_clauses_are_counted_beside_them() -> None:
    assert broken("E2", "raises ValueError", "the law split")[0].endswith("), and 2 failures beyond the clauses")
    assert broken("the behaviour autocast")[0].endswith("), and 1 failure beyond the clauses")
    assert "beyond" not in broken("E2")[0]


def test_an_expected_failure_that_holds_is_told() -> None:
    known = Expected("mine", "issue 1", "E6"), Expected("mine", "issue 2", "E2"), Expected("other", "", "E2")
    found = ledger.Ledger(known, [outcome("test_a", met=(1,))])
    assert told(found)[0].startswith("mine: 1 clauses hold, 1 broken as expected, ")
    assert "  expected E2: 1 test; issue 2" in told(found)
    assert "  expected E6: holds now, so take it out of the file" in told(found)
    assert "  expected E6: not seen, but -k 'laws'" in told(found, "-k 'laws'")


@pytest.mark.parametrize(("met", "left_out", "status"), [((), "", 1), ((0,), "", 0), ((), "-k 'laws'", 0)])
def test_the_run_fails_if_an_expected_failure_holds(
    met: tuple[int, ...], left_out: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = (Expected("mine", "issue 1", "E6"),)
    config: Any = SimpleNamespace(stash={reporter.EXPECTED: known}, getoption=lambda name: None)
    own = reporter.Reporter(config)
    own.outcomes.append(outcome("test_a", met=met).plain())
    monkeypatch.setattr(own, "left_out", lambda: left_out)
    session: Any = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    own.pytest_sessionfinish(session)
    assert session.exitstatus == status


def test_outcomes_pass_between_processes() -> None:
    own = outcome("test_a", "failed", failures=(failure("E2"),), met=(0,))
    assert ledger.Outcome.of(json.loads(json.dumps(own.plain()))) == own


# --- the file of results


def found_by_all() -> results.Results:
    """A run in which each state occurs: what fails is also met, and what does not apply also passes."""
    known = (Expected("mine", "issue 1", "E3", tensor="y"), Expected("mine", "issue 2", "E2", dtype="float16"))
    both = (failure("E2", "Problem(tokens=9, experts=3)"), failure("E2"), failure("the law split"))
    passed = [outcome("test_a", named=("E1", "E2", "D1")), outcome("test_c", named=("E3",), met=(0, 1))]
    told = ledger.Ledger(known, [*passed, outcome("test_b", "failed", failures=both), outcome("test_d", "skipped")])
    own = results.results_of(told, "mine", [summary.Lack("no backward pass", ("D1",)), summary.Lack("no float16")])
    return results.Results({"mine": own, "none": results.results_of(told, "none", [])}, "cpu", "quick", "-k 'a'")


def test_results_tell_each_clause() -> None:
    own = found_by_all().executors["mine"]
    states = {clause: found.state for clause, found in own.clauses.items()}
    assert {clause: states[clause] for clause in ("E1", "E2", "E3", "D1", "E6")} == {
        "E1": "holds",
        "E2": "fails",
        "E3": "fails as expected",
        "D1": "not applicable",
        "E6": "not judged",
    }
    assert own.clauses["E2"] == results.ClauseResult("fails", passed=1, failed=1, skipped=1)
    first, second = own.failures
    assert first == results.FailureKind(
        ("E2",), 2, "E2 on Problem(tokens=9)", "Problem(tokens=9)", "Problem(tokens=9)", "there"
    )
    assert second.breaks == ("the law split",)
    assert own.expected == (
        results.ExpectedResult("E3", "E3 y", "issue 1", 1),
        results.ExpectedResult("E2", "E2 float16", "issue 2", 1),
    )
    assert {found.state for found in found_by_all().executors["none"].clauses.values()} == {"not judged"}


@pytest.mark.parametrize("ending", ["raises ValueError", "ends the process (SIGSEGV)"])
def test_another_error_hides_what_its_test_is_about(ending: str) -> None:
    """Unless a failure breaks it, or an expected one does."""
    known = (Expected("mine", "issue 1", "", raises="ValueError"), Expected("mine", "issue 2", "E3"))
    passed = outcome("test_a", named=("E1", "E2", "E3", "E4", "E6"), met=(1,))
    failed = outcome("test_b", "failed", named=("E1", "E2", "E3"), failures=(failure(ending),))
    also = outcome("test_c", "failed", named=("E2",), failures=(failure("E2"),))
    states = ledger.Ledger(known, [passed, failed, also]).states("mine", ())
    assert [states[clause] for clause in ("E1", "E2", "E3", "E4", "E5")] == [
        "not judged",
        "fails",
        "fails as expected",
        "holds",
        "not judged",
    ]
    expected = outcome("test_d", "failed", named=("E4",), met=(0,))
    assert ledger.Ledger(known, [passed, expected]).states("mine", ())["E4"] == "not judged"


def test_results_are_read_back(tmp_path: Path) -> None:
    results.write_results(tmp_path / "results.json", found_by_all())
    assert results.read_results(tmp_path / "results.json") == found_by_all()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "2", "format='2': must be 'moe-ref results 1'"),
        (("more",), 1, "'more': must be there, and device, executors, "),
        (("executors",), [], r"executors=\[\]: must be an object"),
        (("device",), 3, "device=3: must be a text"),
        (("executors", "mine"), 3, "mine=3: must be an object"),
        (("executors", "mine", "clauses", "E2", "state"), "red", "mine: E2: state='red': must be one of holds, "),
        (("executors", "mine", "clauses", "E2", "passed"), -1, "mine: E2: passed=-1: must be a whole number"),
        (("executors", "mine", "clauses", "E2", "passed"), True, "mine: E2: passed=True: must be a whole number"),
        (("executors", "mine", "clauses", "X9"), {}, "mine: clauses: 'X9': must be all clauses"),
        (("executors", "mine", "failures"), {}, "mine: failures={}: must be a list"),
        (("executors", "mine", "failures", 0, "says"), None, r"mine: failures\[0\]: says=None: must be a text"),
        (("executors", "mine", "failures", 0, "breaks"), ["E2", 2], r"failures\[0\]: breaks\[1\]=2: must be a text"),
        (("executors", "mine", "expected", 0, "tests"), "1", r"expected\[0\]: tests='1': must be a whole number"),
        (("executors", "mine", "lacks", 0), [], r"lacks\[0\]=\[\]: must be an object"),
        (("executors", "a\nb\u202e"), 1, r"a b\\u202e=1: must be an object"),
    ],
)
def test_wrong_results_are_refused_in_one_line(tmp_path: Path, place: Any, value: Any, message: str) -> None:
    path = tmp_path / "results.json"
    results.write_results(path, found_by_all())
    content = inner = json.loads(path.read_text())
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(results.BadResultsError, match=rf"results\.json: .*{message}") as caught:
        results.read_results(path)
    assert "\n" not in str(caught.value)


# --- as a user meets it

SUITE = "--pyargs", "moe_ref.conformance.suite", "--executor", "one_percent", "-k", "exact_cases and many_rows"


def test_a_run_with_expected_failures(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    install(outside, "one_percent", "one_percent:one_percent", ONE_PERCENT)
    ran = run_pytest(outside, *SUITE, "-q", "--save-failure", "saved", "--results", "results.json")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    found = results.read_results(outside / "results.json")
    assert found.version == moe_ref.__version__
    told = found.executors["one_percent"]
    assert (told.clauses["E2"].state, told.clauses["E2"].failed, told.clauses["G1"].state) == ("fails", 8, "not judged")
    assert told.failures[0].again.startswith("from moe_ref.conformance.reporting.again import *; check_exact(get(")
    assert "not all of the suite ran: -k 'exact_cases and many_rows'" in ran.stdout
    assert re.search(rf"^moe-ref {version('moe-ref')}, profile dev, cpu, torch \S+$", ran.stdout, re.MULTILINE)
    assert re.search(r"^tests that were deselected: .*test_exact_cases \(\d\d\), test_laws \(6\)", ran.stdout, re.M)
    assert re.search(r"one_percent: 0 clauses hold, 2 broken, .* not judged here", ran.stdout)
    assert re.search(r"^  breaks E2, D1 \(wrong values\): \d+ failures$", ran.stdout, re.MULTILINE)
    (folder,) = re.findall(r"^    saved: (.*)$", ran.stdout, re.MULTILINE)
    assert [path.suffix for path in sorted(outside.joinpath(folder).iterdir())] == [".mrv", ".safetensors", ".json"]
    assert len([*outside.joinpath("saved").iterdir()]) == 8

    write(outside / "known.json", KNOWN)
    ran = run_pytest(outside, *SUITE, "-q", "-rx", "--expected-failures", "known.json", "--results", "results.json")
    assert ran.returncode == 0, ran.stdout
    told = results.read_results(outside / "results.json")
    assert told.left_out == "-k 'exact_cases and many_rows'"
    assert told.executors["one_percent"].clauses["E2"].state == "fails as expected"
    assert "8 xfailed" in ran.stdout
    assert "XFAIL" in ran.stdout
    assert "  expected E2: 8 tests; issue 1" in ran.stdout

    ran = run_pytest(outside, *SUITE, "--results", "none/results.json")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert ran.stderr.strip() == "ERROR: --results none/results.json: must be in a folder that exists"

    write(outside / "known.json", {"clause": "E2"})
    ran = run_pytest(outside, *SUITE, "--expected-failures", "known.json")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = ran.stderr.strip().splitlines()
    assert line == "ERROR: --expected-failures known.json: one_percent[0]: reason: must be given"


@pytest.mark.nightly
def test_a_run_in_several_processes(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    install(outside, "one_percent", "one_percent:one_percent", ONE_PERCENT)
    write(outside / "known.json", KNOWN)
    ran = run_pytest(outside, *SUITE, "-q", "-n", "2", "--expected-failures", "known.json")
    assert ran.returncode == 0, ran.stdout
    assert "  expected E2: 8 tests; issue 1" in ran.stdout
