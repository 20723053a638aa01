"""The plugin of ``--isolate``: sends the suite's tests to a process, and tells its end as a failure of one test."""

from __future__ import annotations

import time
from typing import Any

import pytest

from moe_ref.conformance.isolation.process import EndedError, StartError, TestProcess
from moe_ref.conformance.reporting.ledger import Failure, Outcome, clauses_of
from moe_ref.conformance.reporting.reporter import EXPECTED, OUTCOME


class Isolation:
    """A plugin of one run.

    Args:
        config: of the run.
        limit: seconds after which one problem counts as hanging.
    """

    def __init__(self, config: pytest.Config, limit: float) -> None:
        self.config = config
        given = [str(argument) for argument in config.invocation_params.args]
        self.process = TestProcess(given, limit, keeps=config.option.capture != "no")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Runs a test of the suite in the other process; others run here."""
        if "judge" not in getattr(item, "fixturenames", ()):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        start = time.time()
        try:
            found = self.process.run(item.nodeid, "" if nextitem is None else nextitem.nodeid)
        except StartError as error:
            pytest.exit(f"--isolate: {error}", pytest.ExitCode.INTERNAL_ERROR)
        except EndedError as error:
            reports = [self._ended(item, error, start), report_of(item, time.time(), when="teardown")]
        else:
            reports = [self._received(report) for report in found]
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self) -> None:
        """Ends the process."""
        self.process.close()

    def _received(self, data: dict[str, Any]) -> pytest.TestReport:
        return self.config.hook.pytest_report_from_serializable(config=self.config, data=data)

    def _ended(self, item: pytest.Item, error: EndedError, start: float) -> pytest.TestReport:
        """A failed test, or one that is expected to end so."""
        name = str(getattr(item, "callspec").params["executor_name"])  # noqa: B009  (functions have it, items in general not)
        known = self.config.stash[EXPECTED]
        met = [
            place for place, own in enumerate(known) if own.executor == name and own.covers_end(error.how, item.name)
        ]
        says = f"the process {error.says}"
        failure = Failure((f"ends the process ({error.how})",), says, error.judged.partition("(")[2], error.judged)
        clauses = clauses_of(getattr(getattr(item, "obj", None), "__doc__", None))
        outcome = Outcome(name, item.name, clauses, "failed", () if met else (failure,), tuple(met))
        report = report_of(item, start, longrepr="\n".join(filter(None, [says, error.judged])))
        report.sections += [("printed by the process", error.printed)] * bool(error.printed)
        report.user_properties.append((OUTCOME, outcome.plain()))
        if met:
            report.outcome = "skipped"
            report.wasxfail = "; ".join(f"{known[place]}: {known[place].reason}" for place in met)
        return report


def report_of(item: pytest.Item, start: float, longrepr: str = "", when: Any = "call") -> pytest.TestReport:
    """The report of a test that failed with ``longrepr``, or of a phase that passed."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={item.name: 1},
        outcome="failed" if longrepr else "passed",
        longrepr=longrepr or None,
        when=when,
        duration=time.time() - start,
        start=start,
        stop=time.time(),
    )


def refusal(config: pytest.Config) -> str:
    """Why tests cannot be isolated in this run, in one line; or ""."""
    asked = config.option
    if getattr(asked, "numprocesses", None) or getattr(asked, "tx", None):
        return "--isolate: must stand without -n: it starts a process of its own, one test after the other"
    if asked.usepdb:
        return "--isolate: must stand without --pdb: tests run in another process"
    if not config.getoption("moe_ref_isolate_limit") > 0:  # NaN is no number of seconds
        return f"--isolate-limit {config.getoption('moe_ref_isolate_limit'):g}: must be a number of seconds above 0"
    return ""
