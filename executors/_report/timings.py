"""Times with their noise, and memory, as bars with numbers."""

from __future__ import annotations

from collections.abc import Sequence

from executors._bench.measure import Spread, spread
from executors._compare.run import MILLISECONDS
from executors._report.judged import JudgedExecutor
from executors._report.markup import Html, breakable, joined, tag

KINDS = {"forward": "forward", "forward_backward": "forward and backward"}


def timings(judged: Sequence[JudgedExecutor]) -> Html:
    """A table for each direction, and one of memory."""
    tables = [_times(what, title, judged) for what, title in KINDS.items()]
    memory = [(own.name, own.row.peak_mib) for own in judged if own.row.peak_mib is not None]
    if memory:
        most = max(peak for _, peak in memory) or 1.0
        rows = [_row(name, Spread(peak, peak, peak), most, f"{peak:.1f}", "") for name, peak in memory]
        tables.append(_table("peak memory with backward", "MiB", rows))
    whole = [table for table in tables if table]
    return tag("div", *whole, class_="times") if whole else tag("p", "nothing was timed", class_="note")


def _times(what: str, title: str, judged: Sequence[JudgedExecutor]) -> Html:
    timed = {own.name: spread(own.row.seconds[what]) for own in judged if own.row.seconds.get(what)}
    if not timed:
        return Html()
    most = max(found.high for found in timed.values())
    rows = [
        _row(name, found, most, _number(found.median), f"{_number(found.low)} to {_number(found.high)}")
        for name, found in timed.items()
    ]
    return _table(title, "ms", rows)


def _table(title: str, unit: str, rows: Sequence[Html]) -> Html:
    caption = tag("caption", tag("b", title), " ", tag("span", unit, class_="quiet"))
    return tag("table", caption, tag("tbody", *rows), class_="bars")


def _row(name: str, found: Spread, most: float, number: str, between: str) -> Html:
    cell = joined(tag("b", number), " ", tag("small", between))
    return tag(
        "tr", tag("th", breakable(name), scope="row"), tag("td", _bar(found, most)), tag("td", cell, class_="number")
    )


def _bar(found: Spread, most: float) -> Html:
    """The median as a bar, and the range as a line on it."""
    low, middle, high = (100 * value / most for value in (found.low, found.median, found.high))
    return tag(
        "svg",
        tag("rect", x=0, y=1, width=f"{middle:.2f}", height=10, class_="bar"),
        tag("line", x1=f"{low:.2f}", x2=f"{high:.2f}", y1=6, y2=6, class_="range"),
        viewBox="0 0 100 12",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _number(seconds: float) -> str:
    """Three digits of milliseconds."""
    value = seconds * MILLISECONDS
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
