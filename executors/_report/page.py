"""The page: one file without anything outside of it, which a browser opens from a disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from executors._compare.report import gate
from executors._compare.run import LABELS, CompareRow
from executors._report.clause_table import clause_table, legend
from executors._report.histograms import histograms
from executors._report.judged import JudgedExecutor, some
from executors._report.markup import Html, breakable, tag
from executors._report.timings import timings
from moe_ref.conformance.judgement.gates import MAX_Z

FOLDER = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page tells.

    Attributes:
        judged: the executors, a column each.
        layer: on the layer that errors and times are of, a line each.
        facts: on the machine and the versions.
        left_out: executors that are not on the page, and why.
    """

    judged: Sequence[JudgedExecutor]
    layer: Sequence[str]
    facts: Sequence[tuple[str, str]]
    left_out: Sequence[tuple[str, str]] = ()


def page(report: Report) -> str:
    """The page's text."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("title", f"moe-ref report: {', '.join(own.name for own in report.judged)}"),
        tag("style", Html(style)),
    )
    body = tag("body", tag("main", *_sections(report)), tag("script", Html(script)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _policy(style: str, script: str) -> str:
    """Nothing is fetched, and no script runs but the page's own."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    own = f"style-src {digest(style)}; script-src {digest(script)}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def _sections(report: Report) -> list[Html]:
    note = f"z is (actual - exact) / error bar; shaded: beyond the limit of {MAX_Z:g}. Counts are logarithmic."
    noise = (
        "Medians of calls that were made in turn. The thin lines and the small numbers span the 10th to the 90th "
        "percentile of the calls: that is the noise, and a difference within it is none."
    )
    measured = [
        tag("h2", "Errors on a layer"),
        *(tag("p", line, class_="note") for line in report.layer),
        tag("p", note, class_="note"),
        histograms(report.judged),
        tag("h2", "Times on this layer"),
        tag("p", noise, class_="note"),
        timings(report.judged),
    ]
    return [
        tag("h1", "moe-ref report"),
        tag(
            "p", _verdict(report), class_="verdict bad" if any(own.failed for own in report.judged) else "verdict good"
        ),
        tag("div", *map(_card, report.judged), class_="cards"),
        *(tag("p", f"{name} is left out: {why}", class_="note") for name, why in report.left_out),
        tag("h2", "The layer and the clauses"),
        legend(),
        clause_table(report.judged),
        *(measured if any(own.row.judgement for own in report.judged) else []),
        tag("h2", "Machine and versions"),
        tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in report.facts), class_="facts"),
    ]


def _verdict(report: Report) -> str:
    wrong = [own.name for own in report.judged if own.failed]
    if not wrong:
        return f"No failure in {len(report.judged)} executor{'s' * (len(report.judged) != 1)}."
    return f"{len(wrong)} of {len(report.judged)} executors fail: {', '.join(wrong)}."


def _card(own: JudgedExecutor) -> Html:
    """An executor in a few lines."""
    kind, symbol = ("card bad", "✗") if own.failed else ("card good", "✓")
    title = tag("h3", tag("span", symbol, aria_hidden="true", class_="symbol"), " ", breakable(own.name))
    lines = [*_suite(own), _layer(own.row), *filter(None, [own.source])]
    lacks = [tag("li", lack.says) for lack in own.suite.results.lacks] if own.suite.results else []
    more = [tag("details", tag("summary", "what it does not promise"), tag("ul", *lacks))] * bool(lacks)
    return tag("section", title, *(tag("p", line) for line in lines), *more, class_=kind)


def _suite(own: JudgedExecutor) -> list[str]:
    """Lines on the suite."""
    suite = own.suite
    if suite.results is None:
        return [own.counted]
    said = suite.left_out.replace("--hypothesis-profile quick", "")  # which the profile says already
    part = f"; not all of it ran: {said}" if said else ""
    by = f"of moe-ref {suite.version}, " * bool(suite.version)
    return [own.counted, f"suite: {by}profile {suite.profile} on {suite.device}{part}"]


def _layer(row: CompareRow) -> str:
    """A line on the layer."""
    judgement = row.judgement
    if judgement is None:
        return f"layer: not run: {row.reason}"
    if judgement.fault:
        return f"layer: FAIL, {judgement.fault}"
    if broken := judgement.broken:
        told = some([f"{LABELS[verdict.name]} ({gate(verdict)})" for verdict in broken])
        return f"layer: FAIL in {told}" + ("; y holds" if broken[0].name != "y" else "")
    name, worst = row.worst()
    return "layer: pass" + ("" if worst is None else f", largest |z| {worst:.3g} in {LABELS[name]}")
