"""What the page tells of each executor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from executors._compare.run import CompareRow
from moe_ref.conformance.judgement.faults import says
from moe_ref.conformance.reporting.ledger import CLAUSES, FAILS, HOLDS, NOT_APPLICABLE, NOT_JUDGED
from moe_ref.conformance.reporting.ledger import EXPECTED as AS_EXPECTED
from moe_ref.conformance.reporting.results import ExecutorResults, FailureKind

WORDS = {
    HOLDS: ("clause holds", "clauses hold"),
    FAILS: ("fails", "fail"),
    AS_EXPECTED: ("fails as expected", "fail as expected"),
    NOT_APPLICABLE: ("not promised", "not promised"),
    NOT_JUDGED: ("not judged", "not judged"),
}
MOST_NAMES = 3  # on a card
GRADIENT = re.compile(r"the gradient of |(?!y differs)\w+ differs ")  # begins a fault that is not about y


@dataclass(frozen=True)
class SuiteRun:
    """What the suite told of one executor.

    Attributes:
        results: by clause; None where it did not finish.
        device, profile: with which it was judged.
        left_out: why tests were left out, or "".
        problem: why it did not finish, in one line, or "".
        again: the command that runs it again.
        version: of moe-ref.
    """

    results: ExecutorResults | None
    device: str = "cpu"
    profile: str = ""
    left_out: str = ""
    problem: str = ""
    again: str = ""
    version: str = ""

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
        compare: the command that judges it on the layer again, or "".
    """

    name: str
    suite: SuiteRun
    row: CompareRow
    source: str = ""
    compare: str = ""

    @property
    def failed(self) -> bool:
        """Whether anything is wrong with it."""
        results = self.suite.results
        return results is None or bool(results.failures) or self.row.failed

    @cached_property
    def on_layer(self) -> tuple[FailureKind, ...]:
        """What is wrong on the layer: a failure for each tensor, or the one that no gate measures."""
        judgement = self.row.judgement
        if judgement is None:
            return ()
        if judgement.fault:
            clause, _, message = judgement.fault.partition(": ")
            if clause in CLAUSES:
                return (FailureKind((clause,), 1, message),)
            return (FailureKind((clause.replace("raised", "raises"),), 1, judgement.fault),)
        told = (says(verdict).partition(": ") for verdict in judgement.broken)
        return tuple(FailureKind(tuple(broken.split(", ")), 1, message) for broken, _, message in told)

    def needs(self, failure: FailureKind) -> set[str]:
        """What a failure on the layer is about: "y", "gradients", or both."""
        if failure.breaks[0] not in CLAUSES:
            return {"y", "gradients"}
        of_y = not failure.breaks[0].startswith("D") and not GRADIENT.match(failure.says)
        return {"y"} if of_y else {"gradients"}

    def breaking(self, what: str) -> list[FailureKind]:
        """Failures that may break a clause, or that are of a kind beyond them: those on the layer, then the suite's."""
        of_suite = self.suite.results.failures if self.suite.results else ()
        return [each for each in (*self.on_layer, *of_suite) if what in each.breaks]

    @property
    def beyond(self) -> list[str]:
        """What fails and is no clause: laws, behaviours and exceptions."""
        of_suite = self.suite.results.failures if self.suite.results else ()
        found = (what for each in (*of_suite, *self.on_layer) for what in each.breaks)
        return [what for what in dict.fromkeys(found) if what not in CLAUSES]

    def state(self, clause: str) -> str:
        """The suite's state of a clause; but a failure on the layer breaks it too."""
        if any(clause in each.breaks for each in self.on_layer):
            return FAILS
        return self.suite.results.clauses[clause].state if self.suite.results else NOT_JUDGED

    @property
    def counted(self) -> str:
        """How many clauses are in which state, in words, and what fails beyond them; or why the suite did not end."""
        if self.suite.results is None:
            return self.suite.problem
        counts = Counter(self.state(clause) for clause in self.suite.results.clauses)
        told = [f"{counts[state]} {WORDS[state][counts[state] != 1]}" for state in WORDS if counts[state]]
        return ", ".join(told) + (f"; also fails, beyond the clauses: {some(self.beyond)}" if self.beyond else "")


def some(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
