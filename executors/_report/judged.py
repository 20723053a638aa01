"""What the page tells of each executor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from executors._compare.run import CompareRow
from moe_ref.conformance.reporting.ledger import EXPECTED as AS_EXPECTED
from moe_ref.conformance.reporting.ledger import FAILS, HOLDS, NOT_APPLICABLE, NOT_JUDGED
from moe_ref.conformance.reporting.results import ExecutorResults

WORDS = {
    HOLDS: ("clause holds", "clauses hold"),
    FAILS: ("fails", "fail"),
    AS_EXPECTED: ("fails as expected", "fail as expected"),
    NOT_APPLICABLE: ("not promised", "not promised"),
    NOT_JUDGED: ("not judged", "not judged"),
}


@dataclass(frozen=True)
class SuiteRun:
    """What the suite told of one executor.

    Attributes:
        results: by clause; None where it did not finish.
        device, profile: with which it was judged.
        left_out: why tests were left out, or "".
        problem: why it did not finish, in one line, or "".
        again: the command that runs it again.
    """

    results: ExecutorResults | None
    device: str = "cpu"
    profile: str = ""
    left_out: str = ""
    problem: str = ""
    again: str = ""

    @property
    def crashed(self) -> bool:
        """Whether a process that judged it came to an end, by itself or by a limit."""
        failures = self.results.failures if self.results else ()
        return self.results is None or any(own.breaks[0].startswith("ends the process") for own in failures)


@dataclass(frozen=True, eq=False)
class JudgedExecutor:
    """An executor with all that was found.

    Attributes:
        name: by which it is registered.
        suite: results by clause.
        row: what came of it on the layer: errors, times and memory.
        source: where it comes from, such as "built-in".
    """

    name: str
    suite: SuiteRun
    row: CompareRow
    source: str = ""

    @property
    def failed(self) -> bool:
        """Whether anything is wrong with it."""
        results = self.suite.results
        return results is None or bool(results.failures) or self.row.failed


def counted(results: ExecutorResults) -> str:
    """How many clauses are in which state, in words."""
    counts = Counter(clause.state for clause in results.clauses.values())
    failures = "" if counts[FAILS] or not results.failures else ", fails beyond the clauses"
    return (
        ", ".join(f"{counts[state]} {WORDS[state][counts[state] != 1]}" for state in WORDS if counts[state]) + failures
    )
