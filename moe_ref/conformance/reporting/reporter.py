"""Collects what came of each test, in the process where it ran, and tells it where the run ends.

It imports nothing before the suite runs, so an installed moe-ref costs other test runs nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moe_ref.conformance.reporting.order import is_of_suite

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from moe_ref.conformance.reporting.expected import Expected
    from moe_ref.conformance.reporting.judge import Judge
    from moe_ref.conformance.reporting.ledger import Failure, Ledger
    from moe_ref.conformance.vectors.reading import Folder

JUDGED: pytest.StashKey[list[str]] = pytest.StashKey()  # names of executors that were not asked for
VECTORS: pytest.StashKey[Folder] = pytest.StashKey()
EXPECTED: pytest.StashKey[tuple[Expected, ...]] = pytest.StashKey()
OUTCOME = "moe-ref outcome"  # a test's property, which passes from xdist's workers to its controller


class Reporter:
    """A plugin of one run.

    Args:
        config: of the run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.outcomes: list[dict[str, Any]] = []
        self.deselected: list[pytest.Item] = []

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Notes the suite's tests that -k, -m or --deselect leave out."""
        self.deselected += [item for item in items if is_of_suite(item)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Tells the judge which test runs."""
        judge = judge_of(item)
        if judge is not None:
            judge.start(item.name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Notes what came of a test by clause. A test that met expected failures only is reported as such."""
        judge = judge_of(item)
        if judge is None or call.when != "call":
            return (yield)
        from moe_ref.conformance.reporting.ledger import Outcome, failures_of

        errors = [] if call.excinfo is None else [*failures_of(call.excinfo.value)]
        if len(errors) > 1:  # of which Hypothesis makes an ExceptionGroup, whose line says nothing
            call.excinfo = pytest.ExceptionInfo.from_exception(errors[0][0])
        report = yield
        report.sections += [("another failure", _told(error)) for error, _ in errors[1:]]

        known = self.config.stash[EXPECTED]
        met = tuple(place for place, own in enumerate(known) if own in judge.met)
        failures = self._failures(item, errors) if report.failed else ()
        outcome = Outcome(judge.name, item.name, self._clauses(item), report.outcome, failures, met)
        report.user_properties.append((OUTCOME, outcome.plain()))
        if report.passed and met:
            report.outcome = "skipped"
            report.wasxfail = "; ".join(f"{known[place]}: {known[place].reason}" for place in met)
        return report

    def _clauses(self, item: pytest.Item) -> tuple[str, ...]:
        """What a test is about: its docstring says it, or its vector."""
        from moe_ref.conformance.reporting.ledger import clauses_of

        vector = getattr(item, "funcargs", {}).get("vector")
        if vector is not None:
            return tuple(self.config.stash[VECTORS].entries[vector]["clauses"])
        return clauses_of(getattr(getattr(item, "obj", None), "__doc__", None))

    def _failures(
        self, item: pytest.Item, errors: Sequence[tuple[BaseException, tuple[Failure, ...]]]
    ) -> tuple[Failure, ...]:
        """All failures of a test, saved if that was asked for."""
        from moe_ref.conformance.judgement.checks import ConformanceError
        from moe_ref.conformance.reporting.saved import save_failure

        directory = self.config.getoption("moe_ref_saved")
        found: list[Failure] = []
        for number, (error, failures) in enumerate(errors):
            saved = ""
            if directory and isinstance(error, ConformanceError):
                try:
                    saved = str(save_failure(Path(directory), error, item.name + f"-{number}" * (number > 0)))
                except OSError as problem:
                    saved = f"not in {directory}: {problem.strerror}"
            found += [replace(own, saved=saved) for own in failures]
        return tuple(found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes the outcome from a report."""
        if report.when == "call":
            self.outcomes += [value for name, value in report.user_properties if name == OUTCOME]  # type: ignore[misc]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fails a run in which an expected failure holds, and writes the results."""
        if hasattr(self.config, "workerinput"):
            return
        if path := self.config.getoption("moe_ref_results"):
            self.write_results(Path(path))
        if not self.outcomes or session.exitstatus != pytest.ExitCode.OK:
            return
        from moe_ref.conformance.reporting.summary import unmet

        ledger = self.ledger()
        if not self.left_out() and any(unmet(ledger, own) for own in ledger.executors()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tells results by clause, and what an executor declares not to offer, lest a pass be overrated."""
        names = self.judged()
        if not names:
            return
        import executors
        from moe_ref.conformance.reporting.applicable import lacks
        from moe_ref.conformance.reporting.summary import lines

        terminalreporter.section("conformance")
        terminalreporter.write_line(self.judged_by())
        ledger, left_out = self.ledger(), self.left_out()
        if left_out:
            terminalreporter.write_line(f"not all of the suite ran: {left_out}")
        if self.deselected:
            counts = Counter(str(getattr(item, "originalname", item.name)) for item in self.deselected)
            said = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            terminalreporter.write_line(f"tests that were deselected: {said}")
        for name in names:
            for line in lines(ledger, name, lacks(executors.get(name).capabilities), left_out):
                terminalreporter.write_line(line.text, red=line.wrong)

    def judged_by(self) -> str:
        """Which suite judged, how long it searched, and where."""
        import torch
        from hypothesis import settings

        import moe_ref
        from moe_ref.conformance.profiles import PROFILES

        active = settings.get_current_profile_name()
        profile = active if active in PROFILES else "dev"
        device = self.config.getoption("moe_ref_device")
        return f"moe-ref {moe_ref.__version__}, profile {profile}, {device}, torch {torch.__version__}"

    def judged(self) -> list[str]:
        """The names of all executors, of those that no test ran on too."""
        names = self.config.getoption("moe_ref_executors") or self.config.stash.get(JUDGED, [])
        return list(dict.fromkeys([*names, *(str(own["executor"]) for own in self.outcomes)]))

    def write_results(self, path: Path) -> None:
        """Writes the results by clause."""
        from hypothesis import settings

        import executors
        import moe_ref
        from moe_ref.conformance.reporting.applicable import lacks
        from moe_ref.conformance.reporting.results import Results, results_of, write_results

        ledger, device = self.ledger(), self.config.getoption("moe_ref_device")
        told = {name: results_of(ledger, name, lacks(executors.get(name).capabilities)) for name in self.judged()}
        try:
            profile = settings.get_current_profile_name()
            write_results(path, Results(told, device, profile, self.left_out(), moe_ref.__version__))
        except OSError as error:
            pytest.exit(f"--results {path}: cannot be written, {error.strerror}", pytest.ExitCode.INTERNAL_ERROR)

    def ledger(self) -> Ledger:
        """All outcomes so far."""
        from moe_ref.conformance.reporting.ledger import Ledger, Outcome

        return Ledger(self.config.stash[EXPECTED], [Outcome.of(own) for own in self.outcomes])

    def left_out(self) -> str:
        """Why not all tests of the suite ran, or ""."""
        from moe_ref.conformance import profiles, suite

        asked = self.config.option
        told = [f"{flag} {value!r}" for flag, value in (("-k", asked.keyword), ("-m", asked.markexpr)) if value]
        told += [flag for flag, value in (("--deselect", asked.deselect), ("--maxfail", asked.maxfail)) if value]
        told += ["single tests were named"] * any("::" in str(own) for own in self.config.args)
        told += ["--hypothesis-profile quick"] * (suite.PROFILE is profiles.PROFILES["quick"])
        ran, own = {outcome["test"].partition("[")[0] for outcome in self.outcomes}, {*suite.__all__}
        if not told and not own <= ran:
            told = [f"without {', '.join(sorted(own - ran))}" if own & ran else "these tests are others"]
        return ", ".join(told)


def _told(error: BaseException) -> str:
    """An error, and how to run it again."""
    again = [note for note in getattr(error, "__notes__", ()) if note.startswith("again: ")]
    return "\n".join([f"{type(error).__name__}: {error}", *again])


def judge_of(item: pytest.Item) -> Judge | None:
    """The judge of a test of the suite; None of other tests."""
    found = getattr(item, "funcargs", {}).get("judge")
    return found if type(found).__module__ == f"{__package__}.judge" else None
