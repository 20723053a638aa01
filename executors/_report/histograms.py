"""Errors of every output and gradient in error bars, as pictures in the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from executors._compare.report import failed, gate
from executors._compare.run import LABELS
from executors._report.judged import JudgedExecutor
from executors._report.markup import Html, joined, tag
from moe_ref.conformance.judgement.gates import MAX_Z

WIDTH, HEIGHT, FOOT = 180, 56, 12
RANGE = 9.0  # error bars on either side; what lies beyond counts at the edge
EDGES = np.linspace(-RANGE, RANGE, 73)


def histograms(judged: Sequence[JudgedExecutor]) -> Html:
    """For each executor that ran, a picture for y and for each gradient."""
    return joined(*(_executor(own) for own in judged))


def _executor(own: JudgedExecutor) -> Html:
    row = own.row
    if row.judgement is None:
        return tag("section", tag("h3", own.name), tag("p", f"not run: {row.reason}", class_="note"))
    verdict = f"FAIL: {failed(row.judgement)}" if row.failed else "pass"
    gates = {broken.name: gate(broken) for broken in row.judgement.broken}
    parts = [tag("h3", own.name), tag("p", verdict, class_="verdict bad" if row.failed else "verdict good")]
    names = [name for name in LABELS if name in row.judgement.z]
    pictures = [
        _figure(own.name, LABELS[name], np.asarray(row.judgement.z[name]), gates.get(name, "")) for name in names
    ]
    return tag("section", *parts, tag("div", *pictures, class_="tiles"))


def _figure(executor: str, label: str, z: np.ndarray, broken: str) -> Html:
    """A tensor's picture; ``broken`` is the gate that it failed, or ""."""
    finite = z[np.isfinite(z)]
    largest = float(np.abs(finite).max(initial=0.0)) if len(finite) == len(z) else math.inf
    rms = float(np.sqrt(np.mean(finite**2))) if len(finite) else 0.0
    beyond = int((np.abs(finite) > MAX_Z).sum()) + len(z) - len(finite)
    says = f"max |z| {largest:.3g}, rms {rms:.2g}" + (f", {beyond} beyond" if beyond else "")
    says += f"; fails by {broken}" if broken else ""
    caption = tag("figcaption", tag("b", label), " ", tag("span", says, class_="bad" if beyond or broken else "quiet"))
    about = f"{label} of {executor}: {len(z)} numbers, {says}"
    return tag("figure", _picture(finite, about), caption)


def _picture(z: np.ndarray, about: str) -> Html:
    """Counts on a logarithmic scale; the shaded parts lie beyond the limit."""
    counts, _ = np.histogram(np.clip(z, EDGES[0], EDGES[-1]), EDGES)
    heights = np.log1p(counts) / max(math.log1p(int(counts.max(initial=1))), 1.0) * (HEIGHT - 4)
    steps = "".join(f"V{HEIGHT - h:.1f}H{_x(edge):.1f}" for h, edge in zip(heights, EDGES[1:], strict=True))
    width = _x(RANGE) - _x(MAX_Z)
    marks = [
        tag("text", text, x=f"{_x(z):.1f}", y=HEIGHT + FOOT - 2, text_anchor=anchor)
        for z, text, anchor in ((-RANGE, "≤-9", "start"), (-MAX_Z, "-6", "middle"), (0, "0", "middle"))
    ]
    marks += [
        tag("text", text, x=f"{_x(z):.1f}", y=HEIGHT + FOOT - 2, text_anchor=anchor)
        for z, text, anchor in ((MAX_Z, "6", "middle"), (RANGE, "≥9", "end"))
    ]
    return tag(
        "svg",
        *(
            tag("rect", x=f"{_x(z):.1f}", y=0, width=f"{width:.1f}", height=HEIGHT, class_="limit")
            for z in (-RANGE, MAX_Z)
        ),
        tag("path", d=f"M0 {HEIGHT}{steps}V{HEIGHT}Z", class_="counts"),
        tag("line", x1=0, x2=WIDTH, y1=HEIGHT, y2=HEIGHT, class_="axis"),
        *marks,
        viewBox=f"0 0 {WIDTH} {HEIGHT + FOOT}",
        role="img",
        aria_label=about,
    )


def _x(z: float) -> float:
    return (z + RANGE) / (2 * RANGE) * WIDTH
