"""The table of clauses by executor. A cell that fails opens a row beneath with the failing example."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from executors._report.cells import LOOKS, badge, cell, group, panel
from executors._report.judged import JudgedExecutor
from executors._report.layer_rows import layer_rows
from executors._report.markup import Html, breakable, tag
from moe_ref.conformance.judgement.laws import SENTENCES as LAWS
from moe_ref.conformance.reporting.ledger import CLAUSES, EXPECTED, FAILS, HOLDS, NOT_APPLICABLE, NOT_JUDGED
from moe_ref.conformance.reporting.results import ExecutorResults
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


def clause_table(judged: Sequence[JudgedExecutor]) -> Html:
    """The table: what the layer shows, what fails beyond the clauses, and the clauses.

    Rows that are no table rows on a narrow screen keep their roles by name.
    """
    names = [tag("th", breakable(own.name), scope="col", role="columnheader") for own in judged]
    head = tag(
        "thead", tag("tr", tag("th", "clause", scope="col", role="columnheader"), *names, role="row"), role="rowgroup"
    )
    bodies = [
        tag(
            "tbody",
            group(GROUPS[letter], len(judged)),
            *(part for clause in clauses for part in _clause(clause, judged)),
            role="rowgroup",
        )
        for letter, clauses in groupby(CLAUSES, key=lambda clause: clause[0])
    ]
    table = tag("table", head, layer_rows(judged), *_beyond(judged), *bodies, class_="clauses", role="table")
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
    return tag("ul", *(tag("li", badge(state), " ", says) for state, says in items), class_="legend")


def _clause(clause: str, judged: Sequence[JudgedExecutor]) -> list[Html]:
    """A clause's row, and the rows that its cells open."""
    cells, panels = [], []
    for place, own in enumerate(judged):
        results, key, failures = own.suite.results, f"e{place}-{clause}", own.breaking(clause)
        kind, symbol, word = LOOKS[own.state(clause)] if results or failures else ("fails", "✗", "did not run")
        if failures or (results and any(each.clause == clause for each in results.expected)):
            cells.append(cell(own.name, kind, symbol, word, opens=key))
            panels.append(panel(key, clause, own, len(judged), failures))
        else:
            title = _why(results, clause) if results else own.suite.problem
            cells.append(cell(own.name, kind, symbol, word, title=title))
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
    """Failures that name no clause: laws, behaviours, and exceptions."""
    kinds = dict.fromkeys(what for own in judged for what in own.beyond)
    if not kinds:
        return []
    rows = [group("Beyond the clauses", len(judged))]
    for number, what in enumerate(kinds):
        cells, panels = [], []
        for place, own in enumerate(judged):
            key, failures = f"e{place}-beyond{number}", own.breaking(what)
            if failures:
                cells.append(cell(own.name, "fails", "✗", "fails", opens=key))
                panels.append(panel(key, what, own, len(judged), failures))
            else:
                cells.append(cell(own.name, "absent", "○", "none"))
        said = LAWS.get(what.removeprefix("the law "), "")  # of a behaviour or an exception, nothing
        head = tag("th", tag("b", what), *([": ", tag("span", said)] * bool(said)), scope="row", role="rowheader")
        rows += [tag("tr", head, *cells, class_="clause", role="row"), *panels]
    return [tag("tbody", *rows, role="rowgroup")]
