"""What came of each test of each executor, told by clause. Tests may have run in several processes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_ref.conformance.judgement.checks import ConformanceError, labels
from moe_ref.conformance.reporting.expected import Expected
from moe_ref.conformance.reporting.pasted import SETUP
from moe_ref.conformance.reporting.search import cause

CLAUSE = re.compile(r"\b([TRGECDQM]\d)\b")
CLAUSES = (
    *("T1", "T2", "R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R9", "G1"),
    *("E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8", "C1", "C2", "C3", "D1", "D2", "D3", "D4", "D5"),
    *("Q1", "Q2", "Q3", "Q4", "Q5", "Q6", "M1"),
)
HOLDS, FAILS, EXPECTED, NOT_APPLICABLE, NOT_JUDGED = STATES = (
    *("holds", "fails", "fails as expected", "not applicable", "not judged"),
)
LAW, BEHAVIOUR = "the law ", "the behaviour "  # begin what a failure breaks that is no clause
AGAIN = "again: "  # begins the note that says how to run a failure again


@dataclass(frozen=True)
class Failure:
    """One failure of one test.

    Attributes:
        breaks: the clauses, or what else it is said to break.
        says: the message, in one line.
        problem: on which it fails, as the call that makes it; "" where there is none.
        again: how to run it again; "" where it cannot be said.
        saved: the folder with its vector, or "".
        cause: what kind of thing is wrong, in words that failures of one kind share; or "".
    """

    breaks: tuple[str, ...]
    says: str
    problem: str = ""
    again: str = ""
    saved: str = ""
    cause: str = ""

    @property
    def kind(self) -> str:
        """What it breaks and why, such as "breaks C1 (wrong values)"."""
        broken = ", ".join(self.breaks)
        said = broken if broken.startswith(("raises ", "ends ")) else f"breaks {broken}"
        return f"{said} ({self.cause})" if self.cause else said

    @property
    def beyond(self) -> bool:
        """Whether it breaks no clause by name: an exception, a law or a behaviour."""
        return not {*self.breaks} & {*CLAUSES}

    @property
    def size(self) -> tuple[bool, int, int]:
        """Grows with the problem, by its sizes and the length of its call; failures without one come last."""
        sizes = re.findall(r"\b(?:tokens|experts|hidden|intermediate)=(\d+)", self.problem)
        return not sizes, sum(map(int, sizes)), len(self.problem)


@dataclass(frozen=True)
class Outcome:
    """What came of one test.

    Attributes:
        executor: the name by which it is registered.
        test: its name.
        clauses: that it is about.
        outcome: "passed", "failed" or "skipped".
        failures: that are not expected.
        met: places of expected failures, in the file, that the test met.
    """

    executor: str
    test: str
    clauses: tuple[str, ...]
    outcome: str
    failures: tuple[Failure, ...] = ()
    met: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As it passes between processes."""
        return asdict(self)

    @classmethod
    def of(cls, found: dict[str, Any]) -> Outcome:
        """The inverse of `plain`."""
        failures = tuple(Failure(**{**own, "breaks": tuple(own["breaks"])}) for own in found["failures"])
        return cls(**{**found, "failures": failures, "clauses": tuple(found["clauses"]), "met": tuple(found["met"])})


@dataclass
class Ledger:
    """All outcomes of a run.

    Attributes:
        expected: all expected failures, in the file's order.
        outcomes: in the order in which they came.
    """

    expected: tuple[Expected, ...] = ()
    outcomes: list[Outcome] = field(default_factory=list)

    def executors(self) -> list[str]:
        """All that were judged."""
        return list(dict.fromkeys(own.executor for own in self.outcomes))

    def of(self, executor: str) -> list[Outcome]:
        """The outcomes of one executor."""
        return [own for own in self.outcomes if own.executor == executor]

    def failures(self, executor: str) -> dict[str, list[Failure]]:
        """Failures that are not expected, by what they break and why; by rank, and the smallest problem first."""
        found: dict[str, list[Failure]] = {}
        for own in self.of(executor):
            for failure in own.failures:
                found.setdefault(failure.kind, []).append(failure)
        ordered = {kind: sorted(own, key=lambda failure: failure.size) for kind, own in found.items()}
        raised = {own.breaks[0] for same in ordered.values() for own in same}
        return dict(sorted(ordered.items(), key=lambda kind: (rank(kind[1][0], raised), kind[1][0].size)))

    def met(self, executor: str) -> dict[Expected, int]:
        """Its expected failures, each with the number of tests that met it."""
        counts = {own: 0 for own in self.expected if own.executor == executor}
        for outcome in self.of(executor):
            for place in outcome.met:
                counts[self.expected[place]] += 1
        return counts

    def states(self, executor: str, inapplicable: Iterable[str]) -> dict[str, str]:
        """By clause, its state.

        A clause holds if a passed test is about it, no failure breaks it, and no test about it raised another error or
        ended its process, which may hide what else would be seen.
        """
        named = {clause for own in self.of(executor) if own.outcome == "passed" for clause in own.clauses}
        broken = {clause for own in self.of(executor) for failure in own.failures for clause in failure.breaks}
        met = {own.clause for own, count in self.met(executor).items() if count}
        seen = named - {clause for own in self.of(executor) if self._hides(own) for clause in own.clauses}
        kinds = ((FAILS, broken), (EXPECTED, met), (NOT_APPLICABLE, {*inapplicable}), (HOLDS, seen))
        return {
            clause: next((state for state, clauses in kinds if clause in clauses), NOT_JUDGED) for clause in CLAUSES
        }

    def _hides(self, outcome: Outcome) -> bool:
        """Whether a test ended in another error than one of the suite, expected or not."""
        raised = any(own.breaks[0].startswith(("raises ", "ends ")) for own in outcome.failures)
        return raised or any(self.expected[place].raises for place in outcome.met)


def rank(failure: Failure, raised: Collection[str]) -> int:
    """The place among failures of one executor: 0 of clauses and exceptions, 1 of behaviours, 2 of what follows from 0.

    A law is mostly broken by wrong values, and a behaviour by an exception that other tests met too.

    Args:
        failure: the failure.
        raised: what any failure breaks, such as "raises ValueError".
    """
    about = failure.breaks[0]
    if about.startswith(BEHAVIOUR):
        return 2 if failure.cause in raised else 1
    return 2 if about.startswith(LAW) else 0


def clauses_of(docstring: str | None) -> tuple[str, ...]:
    """The clauses that a test's docstring names."""
    return tuple(dict.fromkeys(CLAUSE.findall(docstring or "")))


def failures_of(error: BaseException) -> Iterator[tuple[BaseException, tuple[Failure, ...]]]:
    """The errors in an error, which Hypothesis may have grouped, each with its failures."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from failures_of(inner)
        return
    again = next((note for note in getattr(error, "__notes__", ()) if note.startswith(AGAIN)), "")
    if isinstance(error, ConformanceError):
        problem = repr(error.problem)
        yield (
            error,
            tuple(
                Failure(labels(own.clause), own.message, problem, again, cause=cause(own.message, own.tensor))
                for own in error.faults
            ),
        )
        return
    says = " ".join(f"{type(error).__name__}: {error}".split())
    raised = (f"raises {type(error).__name__}",)
    yield error, (Failure(raised, says, again.partition(SETUP)[2].partition("(")[2], again, cause=cause(str(error))),)
