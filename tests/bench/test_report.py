"""``python -m executors report``: what it writes, how it runs the suite, and what it refuses."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import clauses
import executors
import report_page
from executors._cli.app import app
from executors._cli.report import _unmeasured
from executors._compare.run import CompareRow
from executors._report.cells import LOOKS, apart
from executors._report.clause_table import GROUPS
from executors._report.facts import facts
from executors._report.judged import JudgedExecutor, SuiteRun
from executors._report.markup import Html, joined, tag
from executors._report.page import Report, page
from executors._report.suite import PROFILES, SuiteSettings, run_suite
from moe_ref.conformance import profiles
from moe_ref.conformance.judgement.faults import Judgement
from moe_ref.conformance.judgement.gates import Verdict
from moe_ref.conformance.reporting.applicable import Lack
from moe_ref.conformance.reporting.ledger import CLAUSES, STATES
from moe_ref.conformance.reporting.results import (
    ClauseResult,
    ExecutorResults,
    ExpectedResult,
    FailureKind,
    read_results,
)
from moe_ref.conformance.reporting.sentences import SENTENCES
from plugin_runs import install

HOSTILE = """<img src=x onerror=alert(1)>"'&</td><script>alert(1)</script>"""
VOID = {"meta", "wbr"}


class Elements(HTMLParser):
    """What a page has: elements with attributes, and whether all that begins also ends."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.within: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes)))
        self.within += [] if name in VOID else [name]

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.within.pop() == name

    def handle_data(self, text: str) -> None:
        self.texts.append(text)

    def of(self, name: str, **attributes: str) -> list[dict[str, str | None]]:
        return [own for kind, own in self.found if kind == name and attributes.items() <= own.items()]


def judged(name: str = "mine", *failures: FailureKind, row: CompareRow | None = None) -> JudgedExecutor:
    """An executor of which each state occurs."""
    broken = {clause for failure in failures for clause in failure.breaks}
    states = dict(zip(("T2", "Q4", "D1", "E3"), ("holds", *STATES[4:1:-1]), strict=True))
    found = {c: ClauseResult("fails" if c in broken else states.get(c, "holds"), 3, int(c in broken)) for c in CLAUSES}
    known = (ExpectedResult("E3", "E3 y", "issue 12", 2),)
    results = ExecutorResults(found, failures, known, (Lack("no backward pass", ("D1",)),))
    return JudgedExecutor(name, SuiteRun(results, profile="quick"), row or CompareRow(name, "not of this kind"))


KIND = FailureKind(
    *(("E2", "C1"), 3, "y(0, 0)=256.0, but must be exactly 258.0", "Problem(9)", "check_exact(get('mine'))"),
    cause="wrong values",
)


def of(*own: JudgedExecutor) -> Elements:
    return Elements(page(Report(own, ["a layer"], [("system", "one")])))


def test_every_clause_has_a_sentence() -> None:
    assert [*SENTENCES] == [*CLAUSES]
    assert {*SENTENCES} == {*clauses.clauses()}
    assert all(len(says) <= 100 and says.endswith(".") and "\n" not in says for says in SENTENCES.values())
    assert {clause[0] for clause in CLAUSES} == GROUPS.keys()
    assert LOOKS.keys() == {*STATES}


def test_text_is_escaped_and_elements_are_not() -> None:
    assert tag("p", HOSTILE, title=HOSTILE).count("<") == 2
    assert tag("p", tag("b", "<"), class_="a", aria_label="b", open=True, hidden=False) == (
        '<p class="a" aria-label="b" open><b>&lt;</b></p>'
    )
    assert joined("<", Html("<br>")) == "&lt;<br>"


@pytest.mark.parametrize(
    ("says", "parts"),
    [
        ("y(0, 0)=256.0, but must be exactly 258.0", ["y(0, 0)", "256.0", "exactly 258.0"]),
        ("y[3]=1, but must be 2 +- 0.1: max z 9", ["y[3]", "1", "2 +- 0.1", "max z 9"]),
        (
            "dx: rms z=1.001, but must be at most 1, over 9 elements",
            ["dx: rms z", "1.001", "at most 1, over 9 elements"],
        ),
        ("x=nan, but must not be NaN", ["x", "nan", "not be NaN"]),
        ("y differs between two runs", []),
        ("no number, but must be one", []),
    ],
)
def test_a_number_stands_beside_the_right_one(says: str, parts: list[str]) -> None:
    assert [text for _, _, text in apart(says)] == parts


def test_every_clause_has_a_cell_for_every_executor() -> None:
    own = of(
        judged("one", KIND),
        judged("two"),
        JudgedExecutor("three", SuiteRun(None, problem="ended"), CompareRow("three")),
    )
    cells = Counter(cell["class"] for cell in own.of("td", role="cell") if cell.get("class"))
    assert cells["fails"] == 2 + len(CLAUSES)
    assert cells["expected"] == 2
    assert cells["absent"] == 4 + 3 * 2  # none was run on the layer
    assert sum(cells.values()) == 3 * (len(CLAUSES) + 2)
    assert any(cell.get("title") == "no backward pass" for cell in own.of("td"))


def test_a_cell_that_fails_leads_to_its_example() -> None:
    own = of(judged("one", KIND, replace(KIND, breaks=("the law split",), says="raises <odd>")))
    links = [link["href"] for link in own.of("a", **{"class": "opens"})]
    assert links == ["#e0-beyond0", "#e0-E2", "#e0-E3", "#e0-C1"]
    assert [panel["id"] for panel in own.of("tr", **{"class": "panel"})] == [link[1:] for link in links if link]
    text = "|".join(own.texts)
    assert "breaks one of E2, C1 (wrong values): 3 failures, of which this is the smallest" in text
    assert "y(0, 0)|is|256.0|must be|exactly 258.0|" in text
    assert "check_exact(get('mine'))" in text
    assert "expected E3 y: 2 tests; issue 12" in text
    assert "raises <odd>" in text


def test_nothing_that_others_say_becomes_an_element() -> None:
    verdict = Verdict("y", 9.0, failure=HOSTILE)
    row = CompareRow(HOSTILE, judgement=Judgement((verdict,), z={"y": np.zeros(3)}), seconds={"forward": [1.0, 2.0]})
    kind = FailureKind((HOSTILE, "E2"), 1, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    executor = replace(judged(HOSTILE, kind, row=row), source=HOSTILE)
    silent = JudgedExecutor(HOSTILE, SuiteRun(None, problem=HOSTILE, again=HOSTILE), CompareRow(HOSTILE, HOSTILE))
    hostile = Report([executor, silent], [HOSTILE], [(HOSTILE, HOSTILE)], [(HOSTILE, HOSTILE)])
    own = Elements(page(hostile))
    assert own.within == []
    assert not own.of("img")
    assert len(own.of("script")) == 1
    assert not [attribute for _, attributes in own.found for attribute in attributes if attribute.startswith("on")]
    assert "".join(own.texts).count("<img src=x") > 10
    assert {name for name, _ in own.found} == {name for name, _ in of(judged("one", KIND, row=row), silent).found}


def test_the_page_has_nothing_from_outside() -> None:
    text = page(Report([judged("one", KIND)], ["a layer"], [("system", "one")]))
    assert not re.search(r"https?:|@import|url\(|<link|<img|src=", text)
    (policy,) = Elements(text).of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in str(policy["content"])


def test_states_are_counted_in_words() -> None:
    assert judged("one", KIND).counted == "30 clauses hold, 2 fail, 1 fails as expected, 1 not promised, 1 not judged"
    law = replace(KIND, breaks=("the law split",))
    assert judged("one", law, KIND).counted.endswith(", 1 not judged; also fails, beyond the clauses: the law split")


def on_layer(*verdicts: Verdict, fault: str = "") -> CompareRow:
    return CompareRow("one", judgement=Judgement(verdicts, fault=fault))


BIAS = "down_proj_bias(3,)=1, but must be 2 +- 0.1: max z 7.0, limit 6"


def test_what_fails_on_the_layer_counts_in_the_table() -> None:
    row = on_layer(Verdict("y"), Verdict("down_proj_bias", 7.0, failure=BIAS), Verdict("x", 9.0, failure="x(0,)=1"))
    mine = replace(judged("one", row=row), compare="python -m executors compare mine")
    assert mine.state("D1") == "fails"
    assert mine.state("D2") == "holds"  # not of an expert without tokens
    assert mine.counted.startswith("32 clauses hold, 1 fails, 1 fails as expected")
    own, text = of(mine), "|".join(of(mine).texts)
    assert [link["href"] for link in own.of("a", **{"class": "opens"})] == ["#e0-layer-gradients", "#e0-E3", "#e0-D1"]
    assert "|on the layer: breaks D1|number|d down_proj_bias(3,)|is|1|must be|2 +- 0.1|" in text
    assert text.count("python -m executors compare mine") == 2
    assert "layer: FAIL in dx (NaN, infinity or shape), d down_proj_bias (max z 7.0); y holds" in text


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (on_layer(Verdict("y"), Verdict("x")), ["holds", "holds"]),
        (on_layer(Verdict("y")), ["holds", "absent"]),
        (on_layer(Verdict("y", 8.0, failure="y(0,)=1"), Verdict("x")), ["fails", "holds"]),
        (on_layer(fault="raised ValueError: x"), ["fails", "fails"]),
        (on_layer(Verdict("y"), Verdict("x"), fault="C1: x differs between two runs"), ["holds", "fails"]),
        (on_layer(Verdict("y"), Verdict("x"), fault="C1: y differs between two runs"), ["fails", "holds"]),
        (on_layer(Verdict("y"), fault="T2: the gradient of x is float64, but must be float32"), ["holds", "fails"]),
        (on_layer(Verdict("y"), fault="D1: no gradient for x"), ["holds", "fails"]),
        (CompareRow("one", "not here"), ["absent", "absent"]),
    ],
)
def test_inference_and_training_have_a_row_each(row: CompareRow, cells: list[str]) -> None:
    own = of(judged("one", row=row))
    assert [cell["class"] for cell in own.of("td", role="cell") if cell.get("class")][:2] == cells


def test_packages_of_who_is_judged_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "outside", "mine", "mine:Mine", "")
    info = tmp_path / "site" / "mine-1.0.dist-info" / "METADATA"
    info.write_text(info.read_text() + "Requires-Dist: rich[a]>=1 ; extra == 'b'\nRequires-Dist: not-there\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    built_in, mine = (dict(facts([], [name]))["packages"].split(", ") for name in ("native", "mine"))
    assert [name.partition(" ")[0] for name in mine] == [name.partition(" ")[0] for name in built_in] + ["mine", "rich"]


def test_errors_and_times_are_on_the_page() -> None:
    z = {"y": np.array([0.0, 1.5, -7.0, np.nan]), "x": np.zeros(0)}
    row = CompareRow("one", judgement=Judgement(z=z), seconds={"forward": [0.010, 0.012, 0.011]}, peak_mib=3.25)
    own = of(judged("one", row=row))
    assert [picture["aria-label"] for picture in own.of("svg", role="img")] == [
        "y of one: 4 numbers, max |z| inf, rms 4.1, 2 beyond",
        "dx of one: 0 numbers, max |z| 0, rms 0",
    ]
    text = "|".join(own.texts)
    assert "|11| |10.2 to 11.8|" in text
    assert "peak memory with backward| |MiB|one|3.2" in text
    assert "forward and backward" not in text


# --- the suite in a process of its own


def test_profiles_are_those_of_the_suite() -> None:
    assert (*profiles.PROFILES,) == PROFILES


CRASHES = """
import os
import executors

class Crashing:
    name, capabilities = "crashing", executors.Capabilities()
    def __call__(self, x, router_logits, weights): os.abort()
    def experts(self, x, **_): os.abort()
    def check(self, x, weights): pass
"""


def test_an_executor_is_judged_in_another_process() -> None:
    seen: list[int] = []
    run = run_suite("native", SuiteSettings(only="test_second_derivatives"), seen.append)
    assert run.problem == ""
    assert run.results is not None
    assert run.results.clauses["D1"] == ClauseResult("holds", passed=1)
    assert (run.profile, run.device, run.left_out) == (
        "quick",
        "cpu",
        "-k 'test_second_derivatives', --hypothesis-profile quick",
    )
    suite = "pytest --pyargs moe_ref.conformance.suite --executor native --hypothesis-profile quick"
    assert run.again == f"{suite} -k test_second_derivatives"
    assert seen[-1] == 100


def test_one_that_crashes_ends_its_own_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    install(outside, "crashing", "crashing:Crashing", CRASHES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{report_page.ROOT}")
    run = run_suite("crashing", SuiteSettings(only="test_second_derivatives"), lambda done: None)
    assert run.results is not None
    (failure,) = run.results.failures
    assert (failure.breaks, failure.count) == (("ends the process (SIGABRT)",), 1)
    assert failure.again.endswith("check_second_derivatives(get('crashing'))")
    assert run.crashed
    assert _unmeasured("crashing", run) == "it ended the process of the suite"


def test_a_suite_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors._report.suite.PYTEST", ("--pyargs", "moe_ref.conformance.no_suite"))
    run = run_suite("native", SuiteSettings(), lambda done: None)
    assert run.results is None
    assert run.problem.startswith("the suite ended with exit status 4: ERROR: ")


def test_one_that_takes_too_long_is_ended() -> None:
    seen: list[int] = []
    run = run_suite("native", SuiteSettings(limit=0.2), seen.append)
    assert (run.results, run.problem) == (None, "the suite took longer than 0.2 s")
    assert seen == []  # no test has run


# --- the command


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A small layer file."""
    path = tmp_path / "small.safetensors"
    report_page.save_small_layer(path)
    return path


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory takes a process for each executor; test_cli has a test of it."""
    monkeypatch.setattr("executors._compare.run.peak_memory", lambda *_: 1.5)


@pytest.mark.usefixtures("no_memory")
def test_a_report_of_results_that_are_there(layer: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    ran = report_page.make(path, str(layer), "--repeats", "2")
    assert ran.exit_code == 1, ran.output
    assert "native: 24 clauses hold, 6 not promised, 5 not judged\n" in ran.output
    assert re.search(r"^my_loop: \d+ clauses hold, \d fails?, ", ran.output, re.MULTILINE)
    assert re.search(r"^wrote .*report\.html \(\d+ s\)$", ran.output, re.MULTILINE)
    own = Elements(path.read_text())
    text = "|".join(own.texts)
    assert "2 of 5 executors fail: my_loop, one_percent_more." in text
    assert "small.safetensors: T=32, E=4, K=2, H=16, I=8, float32" in text
    assert own.of("a", href="#e3-C1")
    assert "FAIL: C1, E1, E2: y" in text
    assert len(own.of("svg", role="img")) == 5 * 5

    ran = report_page.make(path, str(layer), "--repeats", "1", "--executor", "native", "--executor", "native")
    assert ran.exit_code == 0, ran.output
    assert "No failure in 1 executor." in path.read_text()


@pytest.mark.usefixtures("no_memory")
def test_results_of_an_executor_that_is_not_here(layer: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    ran = CliRunner().invoke(
        app,
        ["report", str(layer), "--results", str(report_page.RESULTS), "--executor", "my_loop", "--out", str(path)],
    )
    assert ran.exit_code == 1, ran.output
    assert "not run: its name is of no installed package" in path.read_text()


def test_all_that_are_usable_are_judged_and_a_crash_is_told(
    layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who crashed in the suite is not run in this process."""
    asked: list[str] = []

    def crash(name: str, settings: SuiteSettings, progress: Callable[[int], None]) -> SuiteRun:
        asked.append(name)
        assert settings == SuiteSettings("ci", limit=7.0)
        return SuiteRun(None, problem="the suite was ended by SIGSEGV")

    monkeypatch.setattr("executors._cli.report.run_suite", crash)
    monkeypatch.setattr("executors._compare.run.judge_executor", lambda *_: pytest.fail("was run"))
    path = tmp_path / "report.html"
    ran = CliRunner().invoke(app, ["report", str(layer), "--out", str(path), "--profile", "ci", "--limit", "7"])
    assert ran.exit_code == 1, ran.output
    able = {name: executors.get(name).capabilities for name in executors.available() if name != "auto"}
    assert sorted(asked) == [n for n, c in able.items() if not c.interpreted and "cpu" in (c.devices or {"cpu"})]
    assert asked[0] == "native"
    assert f"judging {len(asked)} executors, one after the other: native, " in ran.output
    assert "native: the suite was ended by SIGSEGV\n" in ran.output
    text = "|".join(Elements(path.read_text()).texts)
    assert "|layer: not run: the suite did not finish|" in text
    assert "Errors on a layer" not in text  # nor times: nothing ran
    for name in {*executors.names()} - {*asked, "auto"}:
        assert f"{name} is left out: " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor", "nativ"], "--executor nativ: must be one of "),
        (["--profile", "slow"], "--profile slow: must be one of quick, dev, ci, nightly"),
        (["--out", "none/report.html"], "--out none/report.html: must be a file in a folder that exists"),
        (["--out", "."], "--out .: must be a file in a folder that exists"),
        (["--results", "none.json"], "--results none.json: cannot be read, No such file or directory: must be a file"),
        (["--results", "{results}", "--results", "{results}"], "native: must be in one of the files only"),
        (["--results", "{results}", "--executor", "triton"], "--executor triton: must be one of native, grouped_mm, "),
        (
            ["--results", "{results}", "--expected-failures", "x"],
            "--expected-failures x: must be left out with --results",
        ),
        (["--expected-failures", "none.json"], "--expected-failures none.json: must be a file"),
        (["--device", "quantum"], "--device quantum: must be a device that torch has here: "),
        (["none.safetensors"], "none.safetensors: "),
        (["--limit", "0"], "--limit 0.0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [argument.format(results=report_page.RESULTS) for argument in arguments]
    ran = CliRunner().invoke(app, ["report", *given])
    assert ran.exit_code == 2, ran.output
    assert message in ran.stderr
    assert ran.stderr.startswith("error: ")
    assert len(ran.stderr.splitlines()) == 1
    assert [*tmp_path.iterdir()] == []


def test_no_results_are_no_report(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(json.loads(report_page.RESULTS.read_text()) | {"executors": {}}))
    ran = CliRunner().invoke(app, ["report", "--results", str(path), "--out", str(tmp_path / "report.html")])
    assert (ran.exit_code, ran.stderr) == (2, f"error: --results {path}: must have an executor\n")


def test_the_recorded_results_tell_what_they_are_kept_for() -> None:
    found = read_results(report_page.RESULTS).executors
    assert [*found] == [*report_page.RIGHT, *report_page.WRONG]
    assert all(not found[name].failures for name in report_page.RIGHT)
    assert found["my_loop"].clauses["C1"].state == "fails"
    assert found["one_percent_more"].clauses["E2"].state == "fails"


@pytest.mark.nightly
def test_the_whole_command(layer: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "executors", "report", str(layer), "--executor", "native", "--repeats", "2"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert re.match(r"native: \d\d clauses hold, \d not promised, \d not judged\n", ran.stdout)
    own = Elements((tmp_path / "report.html").read_text())
    assert len(own.of("tr", **{"class": "clause"})) == len(CLAUSES)
    assert f"python -m executors report {layer} --executor native --repeats 2" in own.texts
