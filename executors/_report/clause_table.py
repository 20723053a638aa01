"""The table of clauses by executor. A cell that fails opens a row beneath with the failing example."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from executors._report.judged import JudgedExecutor
from executors._report.markup import Html, breakable, joined, tag
from moe_ref.conformance.reporting.ledger import CLAUSES, EXPECTED, FAILS, HOLDS, NOT_APPLICABLE, NOT_JUDGED
from moe_ref.conformance.reporting.results import ExecutorResults, ExpectedResult, FailureKind
from moe_ref.conformance.reporting.sentences import SENTENCES

GROUPS = {
    "T": "Dtypes",
    "R": "Routing",
    "G": "Grouping",
    "E": "Experts",
    "C": "Combine",
    "D": "Derivatives",
    "Q": "NF4 and FP4",
    "M": "MXFP4",
}
LOOKS = {  # of a state: class, symbol, word
    HOLDS: ("holds", "✓", "holds"),
    FAILS: ("fails", "✗", "fails"),
    EXPECTED: ("expected", "✗", "expected"),
    NOT_APPLICABLE: ("absent", "○", "not promised"),
    NOT_JUDGED: ("absent", "·", "not judged"),
}


def clause_table(judged: Sequence[JudgedExecutor]) -> Html:
    """The table. Rows that are grids on a narrow screen keep their roles by name."""
    names = [tag("th", breakable(own.name), scope="col", role="columnheader") for own in judged]
    head = tag(
        "thead", tag("tr", tag("th", "clause", scope="col", role="columnheader"), *names, role="row"), role="rowgroup"
    )
    bodies = [
        tag(
            "tbody",
            _group(GROUPS[letter], len(judged)),
            *(part for clause in clauses for part in _clause(clause, judged)),
            role="rowgroup",
        )
        for letter, clauses in groupby(CLAUSES, key=lambda clause: clause[0])
    ]
    table = tag("table", head, *bodies, *_beyond(judged), class_="clauses", role="table")
    return tag("div", table, class_="scrolls")


def legend() -> Html:
    """What the cells mean."""
    items = (
        (HOLDS, "tests about it pass and none breaks it"),
        (FAILS, "click for the failing example"),
        (EXPECTED, "a failure that the adopter listed"),
        (NOT_APPLICABLE, "the executor does not declare it"),
        (NOT_JUDGED, "no test about it passed here"),
    )
    return tag("ul", *(tag("li", _badge(state), " ", says) for state, says in items), class_="legend")


def _badge(state: str) -> Html:
    kind, symbol, word = LOOKS[state]
    return tag("span", tag("span", symbol, aria_hidden="true"), f" {word}", class_=f"badge {kind}")


def _group(title: str, columns: int) -> Html:
    return tag(
        "tr",
        tag("th", tag("span", title), colspan=columns + 1, scope="colgroup", role="rowheader"),
        class_="group",
        role="row",
    )


def _clause(clause: str, judged: Sequence[JudgedExecutor]) -> list[Html]:
    """A clause's row, and the rows that its cells open."""
    cells, panels = [], []
    for place, own in enumerate(judged):
        results, key = own.suite.results, f"e{place}-{clause}"
        if results is None:
            cells.append(_cell(own.name, "fails", "✗", "did not run", title=own.suite.problem))
            continue
        found = results.clauses[clause]
        kind, symbol, word = LOOKS[found.state]
        failures = [each for each in results.failures if clause in each.breaks]
        known = [each for each in results.expected if each.clause == clause]
        if failures or known:
            cells.append(_cell(own.name, kind, symbol, word, opens=key))
            panels.append(_panel(key, clause, own, len(judged), [*map(_failure, failures), *map(_known, known)]))
        else:
            cells.append(_cell(own.name, kind, symbol, word, title=_why(results, clause)))
    head = tag("th", tag("b", clause), " ", tag("span", SENTENCES[clause]), scope="row", role="rowheader")
    return [tag("tr", head, *cells, class_="clause", role="row"), *panels]


def _why(results: ExecutorResults, clause: str) -> str:
    """A line on a cell that opens nothing."""
    found = results.clauses[clause]
    if found.state == NOT_APPLICABLE:
        return next((lack.says for lack in results.lacks if clause in lack.clauses), "")
    tests = f"tests about it: {found.passed} passed, {found.failed} broke another clause, {found.skipped} were skipped"
    return "no test is about it" if not found.passed + found.failed + found.skipped else tests


def _beyond(judged: Sequence[JudgedExecutor]) -> list[Html]:
    """Failures that name no clause: laws, and exceptions."""
    kinds = {
        what: None
        for own in judged
        for failure in (own.suite.results.failures if own.suite.results else ())
        for what in failure.breaks
        if what not in CLAUSES
    }
    if not kinds:
        return []
    rows = [_group("Beyond the clauses", len(judged))]
    for number, what in enumerate(kinds):
        cells, panels = [], []
        for place, own in enumerate(judged):
            failures = [
                each for each in (own.suite.results.failures if own.suite.results else ()) if what in each.breaks
            ]
            key = f"e{place}-beyond{number}"
            if failures:
                cells.append(_cell(own.name, "fails", "✗", "fails", opens=key))
                panels.append(_panel(key, what, own, len(judged), [_failure(each) for each in failures]))
            else:
                cells.append(_cell(own.name, "absent", "○", "none"))
        rows += [
            tag("tr", tag("th", what, scope="row", role="rowheader"), *cells, class_="clause", role="row"),
            *panels,
        ]
    return [tag("tbody", *rows, role="rowgroup")]


def _cell(name: str, kind: str, symbol: str, word: str, *, opens: str = "", title: str = "") -> Html:
    """A state in colour, symbol and word. The executor's name stands in it for narrow screens, which have no head."""
    inner = joined(
        tag("span", breakable(name), class_="of", aria_hidden="true"),
        tag("span", symbol, class_="symbol", aria_hidden="true"),
        tag("span", word, class_="word"),
    )
    if opens:
        inner = tag("a", inner, href=f"#{opens}", class_="opens")
    return tag("td", inner, class_=kind, role="cell", **({"title": title} if title else {}))


def _panel(key: str, what: str, own: JudgedExecutor, columns: int, parts: Sequence[Html]) -> Html:
    """A row that is hidden until its cell is clicked, or its address is opened."""
    whole = [tag("h4", f"{what} on {own.name}"), *parts]
    if own.suite.again:
        whole += [tag("p", "The suite again, in a shell:"), _pasted(own.suite.again)]
    cell = tag("td", tag("div", *whole, class_="example"), colspan=columns + 1, role="cell")
    return tag("tr", cell, id=key, class_="panel", role="row", tabindex=-1)


def _failure(failure: FailureKind) -> Html:
    """The smallest failure of a kind: what is wrong, the number beside the right one, and how to run it again."""
    several = f"one of {', '.join(failure.breaks)}" if len(failure.breaks) > 1 else failure.breaks[0]
    said = several if several.startswith(("raises ", "ends ")) else f"breaks {several}"
    heading = f"{said}{f' ({failure.cause})' if failure.cause else ''}: {_counted(failure.count)}"
    number = apart(failure.says)
    parts = [tag("p", heading, class_="breaks")]
    if number:
        told = (tag("div", tag("dt", key), tag("dd", text, class_=kind)) for kind, key, text in number)
        parts.append(tag("dl", *told))
    else:
        parts.append(tag("p", failure.says, class_="says"))
    if failure.problem:
        parts += [tag("p", "On the problem:"), _pasted(failure.problem)]
    if failure.again:
        parts += [tag("p", "This failure again, in Python:"), _pasted(failure.again)]
    if failure.saved:
        parts.append(tag("p", "Saved as a vector: ", tag("code", failure.saved)))
    return tag("section", *parts)


def _counted(failures: int) -> str:
    return "one failure" if failures == 1 else f"{failures} failures, of which this is the smallest"


def _known(known: ExpectedResult) -> Html:
    tests = f"{known.tests} test{'s' * (known.tests != 1)}"
    return tag("section", tag("p", f"expected {known.says}: {tests}; {known.reason}", class_="breaks"))


def _pasted(text: str) -> Html:
    return tag("pre", tag("code", text))


def apart(says: str) -> list[tuple[str, str, str]]:
    """The parts of a message such as "y(0, 0)=1.5, but must be 1.0 +- 0.1: max z 5", each with a class and a name.

    Of another message, none.
    """
    found, between, right = says.partition(", but must ")
    what, equals, number = found.partition("=")
    if not between or not equals:
        return []
    right, _, gate = right.removeprefix("be ").partition(": ")
    parts = [("what", "number", what), ("wrong", "is", number), ("right", "must be", right)]
    return parts + ([("gate", "by the gate", gate)] if gate else [])
