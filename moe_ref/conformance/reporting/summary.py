"""What the suite prints at the end of a run, by executor and clause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_ref.conformance.reporting.applicable import Lack
from moe_ref.conformance.reporting.expected import Expected
from moe_ref.conformance.reporting.ledger import (
    EXPECTED,
    FAILS,
    HOLDS,
    NOT_APPLICABLE,
    NOT_JUDGED,
    Failure,
    Ledger,
    rank,
)

WIDEST = 400  # characters of a message
SHOWN = 8  # kinds of failures of clauses, and as many that may follow from them, each with an example
NAMED = 16  # more of them, each in one line


class Line(NamedTuple):
    """A line, and whether it tells of something wrong."""

    text: str
    wrong: bool = False


def lines(ledger: Ledger, executor: str, lacking: Sequence[Lack], left_out: str) -> Iterator[Line]:
    """What is told of an executor.

    Args:
        ledger: the outcomes.
        executor: its name.
        lacking: what it does not declare.
        left_out: why tests were left out of this run, or "".
    """
    met, failures = ledger.met(executor), ledger.failures(executor)
    if ledger.of(executor):
        yield Line(f"{executor}: {_counted(ledger, executor, lacking)}", wrong=bool(failures))
    yield from _failures(failures)
    for expected, count in met.items():
        if count:
            yield Line(f"  expected {expected}: {tests(count)}; {expected.reason}")
    for expected in unmet(ledger, executor) if ledger.of(executor) else ():
        if left_out:
            yield Line(f"  expected {expected}: not seen, but {left_out}")
        else:
            yield Line(f"  expected {expected}: holds now, so take it out of the file", wrong=True)
    for lack in lacking:
        yield Line(f"{executor}: {lack.says}")


def _failures(failures: Mapping[str, Sequence[Failure]]) -> Iterator[Line]:
    """All kinds of failures: the first of each rank with an example, and all that follow from no other."""
    raised = {failure.breaks[0] for own in failures.values() for failure in own}
    seen, short = Counter[int](), []
    for kind, own in failures.items():
        place = rank(own[0], raised)
        seen[place] += 1
        if place == 1 or seen[place] <= SHOWN:
            yield from _failure(kind, own)
        else:
            short.append(_head(kind, own))
    if short:
        yield Line("  without an example here, which --results FILE has:", wrong=True)
    yield from short[:NAMED]
    if len(short) > NAMED:
        yield Line(f"  and {len(short) - NAMED} other kinds of failures", wrong=True)


def unmet(ledger: Ledger, executor: str) -> list[Expected]:
    """Expected failures that no test met."""
    return [expected for expected, count in ledger.met(executor).items() if not count]


def tests(count: int) -> str:
    """The words for a number of tests."""
    return f"{count} test{'s' if count != 1 else ''}"


def _counted(ledger: Ledger, executor: str, lacking: Sequence[Lack]) -> str:
    """How many clauses hold, fail, do not apply, or were not judged."""
    states = ledger.states(executor, {clause for lack in lacking for clause in lack.clauses})
    counts = Counter(states.values())
    parts = [f"{counts[HOLDS]} clauses hold"]
    for state, says in ((FAILS, "broken"), (EXPECTED, "broken as expected")):
        if counts[state]:
            parts.append(f"{counts[state]} {says}")
    parts.append(f"{counts[NOT_APPLICABLE]} not applicable")
    if counts[NOT_JUDGED]:
        rest = ", ".join(clause for clause, state in states.items() if state == NOT_JUDGED)
        parts.append(f"{counts[NOT_JUDGED]} not judged here ({rest})")
    beyond = sum(failure.beyond for own in ledger.failures(executor).values() for failure in own)
    if beyond:
        parts.append(f"and {beyond} failure{'s' * (beyond > 1)} beyond the clauses")
    return ", ".join(parts)


def _head(kind: str, own: Sequence[Failure]) -> Line:
    return Line(f"  {kind}: {len(own)} failure{'s' * (len(own) > 1)}", wrong=True)


def _failure(kind: str, own: Sequence[Failure]) -> Iterator[Line]:
    """The smallest of some failures of one kind."""
    first = own[0]
    yield _head(kind, own)
    yield Line(f"    {first.says if len(first.says) <= WIDEST else first.says[:WIDEST] + ' ...'}", wrong=True)
    if first.again:
        yield Line(f"    {first.again}")
    if first.saved:
        yield Line(f"    saved: {first.saved}")
