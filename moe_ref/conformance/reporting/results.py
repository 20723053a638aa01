"""Results by clause as a JSON file, which ``--results FILE`` writes and other programs read.

The file has ``format``, ``version`` (of moe-ref), ``device``, ``profile`` (of Hypothesis), ``left_out`` (why tests were
left out, or "") and ``executors``. Each of these, by its name, has ``clauses``, ``failures``, ``expected`` and
``lacks``, whose keys are the attributes of `ClauseResult`, `FailureKind`, `ExpectedResult` and `Lack`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from executors._files.text import one_line
from executors._files.whole import write_json
from moe_ref.conformance.reporting.applicable import Lack
from moe_ref.conformance.reporting.form import read_form
from moe_ref.conformance.reporting.ledger import AGAIN, CLAUSES, STATES, Failure, Ledger

FORMAT = "moe-ref results 1"
OUTCOMES = ("passed", "failed", "skipped")


class BadResultsError(ValueError):
    """A file of results is not of the form; the message says in one line what is."""


@dataclass(frozen=True)
class ClauseResult:
    """What came of one clause.

    Attributes:
        state: one of `STATES`.
        passed, failed, skipped: tests that name it. A failed test may break another clause.
    """

    state: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class FailureKind:
    """Failures that break the same for the same cause.

    Attributes:
        breaks: the clauses, or what else it is said to break.
        count: how many failures there are.
        says: the message of the smallest one, in one line.
        problem: on which it fails, as the call that makes it; "" where there is none.
        again: the line of Python that runs it again; "" where it cannot be said.
        saved: the folder with its vector, or "".
        cause: what is wrong, in words without numbers; or "".
    """

    breaks: tuple[str, ...]
    count: int
    says: str
    problem: str = ""
    again: str = ""
    saved: str = ""
    cause: str = ""


@dataclass(frozen=True)
class ExpectedResult:
    """An expected failure, and how many tests met it."""

    clause: str
    says: str
    reason: str
    tests: int


@dataclass(frozen=True)
class ExecutorResults:
    """What came of one executor: by clause, by kind of failure, and what it does not declare."""

    clauses: Mapping[str, ClauseResult]
    failures: tuple[FailureKind, ...] = ()
    expected: tuple[ExpectedResult, ...] = ()
    lacks: tuple[Lack, ...] = ()


@dataclass(frozen=True)
class Results:
    """What a run of the suite told.

    Attributes:
        executors: by name.
        device: where they were judged.
        profile: of Hypothesis.
        left_out: why tests were left out, or "".
        version: of moe-ref.
    """

    executors: Mapping[str, ExecutorResults]
    device: str = "cpu"
    profile: str = ""
    left_out: str = ""
    version: str = ""


def results_of(ledger: Ledger, executor: str, lacking: Sequence[Lack]) -> ExecutorResults:
    """What came of an executor.

    Args:
        ledger: the outcomes.
        executor: its name.
        lacking: what it does not declare.
    """
    states = ledger.states(executor, {clause for lack in lacking for clause in lack.clauses})
    counts = {clause: Counter[str]() for clause in CLAUSES}
    for outcome in ledger.of(executor):
        for clause in outcome.clauses:
            counts[clause][outcome.outcome] += 1
    return ExecutorResults(
        {clause: ClauseResult(states[clause], *(counts[clause][word] for word in OUTCOMES)) for clause in CLAUSES},
        tuple(_kind(first, len(own)) for own in ledger.failures(executor).values() for first in own[:1]),
        tuple(
            ExpectedResult(own.clause, str(own), own.reason, count)
            for own, count in ledger.met(executor).items()
            if count
        ),
        tuple(lacking),
    )


def _kind(first: Failure, count: int) -> FailureKind:
    """Failures of which this is the smallest. A text that is no call of `Problem` is there for its order only."""
    problem = first.problem if first.problem.startswith("Problem(") else ""
    again = first.again.removeprefix(AGAIN)
    return FailureKind(first.breaks, count, first.says, problem, again, first.saved, first.cause)


def write_results(path: Path, results: Results) -> None:
    """Writes the file, whole or not at all.

    Raises:
        OSError: it cannot be written; in one line.
    """
    told = {
        name: asdict(own) | {"lacks": [lack._asdict() for lack in own.lacks]} for name, own in results.executors.items()
    }
    write_json(path, {"format": FORMAT, **asdict(results), "executors": told})


def read_results(path: Path) -> Results:
    """Reads what `write_results` has written.

    Raises:
        BadResultsError: it is missing, or not of the form; in one line.
    """
    found = read_form(path, FORMAT, BadResultsError)
    form = _Form(path)
    form.keys("", found, {"format", "executors", "device", "profile", "left_out", "version"})
    own = form.mapping("executors", found["executors"])
    texts = (form.text(key, found[key]) for key in ("device", "profile", "left_out", "version"))
    return Results({name: _executor(form, name, each) for name, each in own.items()}, *texts)


def _executor(form: _Form, name: str, found: Any) -> ExecutorResults:
    form.keys(name, found, {"clauses", "failures", "expected", "lacks"})
    clauses = form.mapping(f"{name}: clauses", found["clauses"])
    if [*clauses] != [*CLAUSES]:
        odd = next((clause for clause in [*clauses, *CLAUSES] if (clause in clauses) != (clause in CLAUSES)), "order")
        form.refuse(f"{name}: clauses: {odd!r:.60}", f"all clauses from {CLAUSES[0]} to {CLAUSES[-1]}, in that order")
    return ExecutorResults(
        {clause: _clause(form, f"{name}: {clause}", own) for clause, own in clauses.items()},
        tuple(_failure(form, *own) for own in form.items(f"{name}: failures", found["failures"])),
        tuple(_expected(form, *own) for own in form.items(f"{name}: expected", found["expected"])),
        tuple(_lack(form, *own) for own in form.items(f"{name}: lacks", found["lacks"])),
    )


def _clause(form: _Form, where: str, found: Any) -> ClauseResult:
    form.keys(where, found, {"state", *OUTCOMES})
    if found["state"] not in STATES:
        form.refuse(f"{where}: state={found['state']!r:.60}", f"one of {', '.join(STATES)}")
    return ClauseResult(found["state"], *(form.count(f"{where}: {word}", found[word]) for word in OUTCOMES))


def _failure(form: _Form, where: str, found: Any) -> FailureKind:
    texts = ("says", "problem", "again", "saved", "cause")
    form.keys(where, found, {"breaks", "count", *texts})
    breaks, count = form.texts(f"{where}: breaks", found["breaks"]), form.count(f"{where}: count", found["count"])
    return FailureKind(breaks, count, *(form.text(f"{where}: {key}", found[key]) for key in texts))


def _expected(form: _Form, where: str, found: Any) -> ExpectedResult:
    texts = ("clause", "says", "reason")
    form.keys(where, found, {"tests", *texts})
    clause, says, reason = (form.text(f"{where}: {key}", found[key]) for key in texts)
    return ExpectedResult(clause, says, reason, form.count(f"{where}: tests", found["tests"]))


def _lack(form: _Form, where: str, found: Any) -> Lack:
    form.keys(where, found, {"says", "clauses"})
    return Lack(form.text(f"{where}: says", found["says"]), form.texts(f"{where}: clauses", found["clauses"]))


@dataclass(frozen=True)
class _Form:
    """What values of a file must be; refuses others in one line."""

    path: Path

    def refuse(self, what: str, allowed: str) -> NoReturn:
        raise BadResultsError(one_line(f"{self.path}: {what}: must be {allowed}"))

    def keys(self, where: str, found: Any, allowed: set[str]) -> None:
        if self.mapping(where or "content", found).keys() != allowed:
            odd = sorted(found.keys() ^ allowed)[0]
            self.refuse(
                f"{where}: {odd!r:.60}".removeprefix(": "), f"there, and {', '.join(sorted(allowed))} all there is"
            )

    def mapping(self, where: str, found: Any) -> dict[str, Any]:
        if not isinstance(found, dict):
            self.refuse(f"{where}={found!r:.60}", "an object")
        return found

    def items(self, where: str, found: Any) -> list[tuple[str, Any]]:
        if not isinstance(found, list):
            self.refuse(f"{where}={found!r:.60}", "a list")
        return [(f"{where}[{place}]", each) for place, each in enumerate(found)]

    def text(self, where: str, found: Any) -> str:
        if not isinstance(found, str):
            self.refuse(f"{where}={found!r:.60}", "a text")
        return found

    def texts(self, where: str, found: Any) -> tuple[str, ...]:
        return tuple(self.text(*each) for each in self.items(where, found))

    def count(self, where: str, found: Any) -> int:
        if type(found) is not int or found < 0:
            self.refuse(f"{where}={found!r:.60}", "a whole number of at least 0")
        return found
