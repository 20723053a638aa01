"""Cells of the table, and the panels that they open: what fails, the number beside the right one, and how to see it."""

from __future__ import annotations

from collections.abc import Sequence

from executors._report.judged import JudgedExecutor
from executors._report.markup import Html, breakable, joined, tag
from moe_ref.conformance.reporting.ledger import EXPECTED, FAILS, HOLDS, NOT_APPLICABLE, NOT_JUDGED
from moe_ref.conformance.reporting.results import ExpectedResult, FailureKind

LOOKS = {  # of a state: class, symbol, word
    HOLDS: ("holds", "✓", "holds"),
    FAILS: ("fails", "✗", "fails"),
    EXPECTED: ("expected", "✗", "expected"),
    NOT_APPLICABLE: ("absent", "○", "not promised"),
    NOT_JUDGED: ("absent", "·", "not judged"),
}


def badge(state: str) -> Html:
    """A state as the legend shows it."""
    kind, symbol, word = LOOKS[state]
    return tag("span", tag("span", symbol, aria_hidden="true"), f" {word}", class_=f"badge {kind}")


def group(title: str, columns: int) -> Html:
    """A row with a title above others."""
    return tag(
        "tr",
        tag("th", tag("span", title), colspan=columns + 1, scope="colgroup", role="rowheader"),
        class_="group",
        role="row",
    )


def cell(name: str, kind: str, symbol: str, word: str, *, opens: str = "", title: str = "") -> Html:
    """A state in colour, symbol and word. The executor's name stands in it for narrow screens, which have no head."""
    inner = joined(
        tag("span", breakable(name), class_="of", aria_hidden="true"),
        tag("span", symbol, class_="symbol", aria_hidden="true"),
        tag("span", word, class_="word"),
    )
    if opens:
        inner = tag("a", inner, href=f"#{opens}", class_="opens")
    return tag("td", inner, class_=kind, role="cell", **({"title": title} if title else {}))


def panel(key: str, what: str, own: JudgedExecutor, columns: int, failures: Sequence[FailureKind]) -> Html:
    """A row that is hidden until its cell is clicked, or its address is opened.

    Args:
        key: its address.
        what: a clause, or what else it is about.
        own: the executor.
        columns: how many executors there are.
        failures: those of the executor on the layer come first; the rest is the suite's.
    """
    on_layer = [each for each in failures if each in own.on_layer]
    of_suite = [failure(each) for each in failures if each not in own.on_layer]
    of_suite += [
        known(each) for each in (own.suite.results.expected if own.suite.results else ()) if each.clause == what
    ]
    whole = [tag("h4", f"{what} on {own.name}"), *(failure(each, "on the layer: ") for each in on_layer)]
    if on_layer and own.compare:
        whole += [tag("p", "The layer again, in a shell:"), _pasted(own.compare)]
    whole += of_suite
    if of_suite and own.suite.again:
        whole += [tag("p", "The suite again, in a shell:"), _pasted(own.suite.again)]
    inner = tag("td", tag("div", *whole, class_="example"), colspan=columns + 1, role="cell")
    return tag("tr", inner, id=key, class_="panel", role="row", tabindex=-1)


def failure(found: FailureKind, where: str = "") -> Html:
    """The smallest failure of a kind: what is wrong, the number beside the right one, and how to run it again."""
    several = f"one of {', '.join(found.breaks)}" if len(found.breaks) > 1 else found.breaks[0]
    said = several if several.startswith(("raises ", "ends ")) else f"breaks {several}"
    counted = "" if where else f": {_counted(found.count)}"
    heading = f"{where}{said}{f' ({found.cause})' if found.cause else ''}{counted}"
    number = apart(found.says)
    parts = [tag("p", heading, class_="breaks")]
    if number:
        told = (tag("div", tag("dt", key), tag("dd", text, class_=kind)) for kind, key, text in number)
        parts.append(tag("dl", *told))
    else:
        parts.append(tag("p", found.says, class_="says"))
    if found.problem:
        parts += [tag("p", "On the problem:"), _pasted(found.problem)]
    if found.again:
        parts += [tag("p", "This failure again, in Python:"), _pasted(found.again)]
    if found.saved:
        parts.append(tag("p", "Saved as a vector: ", tag("code", found.saved)))
    return tag("section", *parts)


def _counted(failures: int) -> str:
    return "one failure" if failures == 1 else f"{failures} failures, of which this is the smallest"


def known(found: ExpectedResult) -> Html:
    """A failure that the adopter listed, and how many tests met it."""
    tests = f"{found.tests} test{'s' * (found.tests != 1)}"
    return tag("section", tag("p", f"expected {found.says}: {tests}; {found.reason}", class_="breaks"))


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
