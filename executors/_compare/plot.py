"""The picture of a comparison: every tensor's errors in error bars, beside time and memory."""

from __future__ import annotations

import math
import textwrap
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from executors._compare.report import gate
from executors._compare.run import LABELS, CompareRow
from executors._files.whole import replacing
from moe_ref.conformance.judgement.gates import MAX_Z

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's, for colour-blind eyes
EDGES = np.linspace(-9, 9, 73)
DPI = 130
LONGEST_NAME = 40  # in the legend


def plot(path: Path, rows: list[CompareRow], title: str) -> None:
    """Writes the picture."""
    save(drawn(rows, title), path)


def drawn(rows: list[CompareRow], title: str) -> Figure:
    """The picture: errors of all that ran, with the colours' names below; times and memory beside them."""
    ran = [row for row in rows if row.judgement is not None and row.judgement.z]
    tensors = [name for name in LABELS if any(name in row.judgement.z for row in ran if row.judgement)]
    figure = Figure(figsize=(10.5, 1.3 + 0.72 * max(len(tensors), 5)), dpi=DPI, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.75, 1])[0]
    axes = left.subplots(max(len(tensors), 1), 1, sharex=True, squeeze=False)
    _errors(list(axes[:, 0]), tensors, ran)
    left.suptitle("errors of every element, in error bars (counts, logarithmic)", fontsize=10)
    _legend(left, ran)
    times, memory = right.subplots(2, 1)
    _times(times, ran)
    _memory(memory, ran)
    figure.suptitle(title, fontsize=11)
    return figure


def save(figure: Figure, path: Path, dpi: float | None = None) -> None:
    """Writes a picture, whole or not at all; ``dpi`` is the figure's own, or another."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi or "figure")


def _errors(axes: list[Axes], tensors: list[str], ran: list[CompareRow]) -> None:
    for ax, name in zip(axes, tensors, strict=False):
        most = 1
        broken: list[tuple[str, str]] = []
        earlier: list[np.ndarray] = []
        for row, colour in zip(ran, cycle(COLOURS), strict=False):
            if row.judgement is None or name not in row.judgement.z:
                continue
            z = row.judgement.z[name]
            z = z[np.isfinite(z)]
            counts, _ = np.histogram(np.clip(z, EDGES[0], EDGES[-1]), EDGES)
            most = max(most, int(counts.max()))
            same = any(np.array_equal(counts, each) for each in earlier)  # dashed: the line below it is seen, too
            style = (0, (5, 5)) if same else "solid"
            ax.stairs(counts, EDGES, color=colour, fill=len(ran) == 1, alpha=0.9, linewidth=1.4, linestyle=style)
            earlier.append(counts)
            broken += [(colour, gate(v)) for v in row.judgement.broken if v.name == name]
        for place, (colour, figure) in enumerate(broken):
            ax.text(
                0.015,
                0.95 - 0.21 * place,
                f"FAIL {figure}",
                transform=ax.transAxes,
                va="top",
                fontsize=7,
                color=colour,
                weight="bold",
            )
        ax.set_yscale("log")
        ax.set_ylim(0.5, 2 * most)
        ax.set_yticks([])
        ax.minorticks_off()
        ax.axvspan(MAX_Z, EDGES[-1], color="#bbbbbb", alpha=0.45, linewidth=0)
        ax.axvspan(EDGES[0], -MAX_Z, color="#bbbbbb", alpha=0.45, linewidth=0)
        ax.set_xlim(EDGES[0], EDGES[-1])
        ax.set_ylabel(LABELS[name], rotation=0, ha="right", va="center", fontsize=9)
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xticks([-9, -6, -3, 0, 3, 6, 9], ["≤ -9", "-6", "-3", "0", "3", "6", "≥ 9"])
    axes[-1].set_xlabel("z = (actual - exact) / error bar; grey: beyond the limit of 6")


def _legend(figure: SubFigure, ran: list[CompareRow]) -> None:
    """Whose line has which colour, and whether it passes, below the errors."""
    handles = [
        Line2D([], [], color=colour, linewidth=3, label=f"{_cut(row.name)}: {_word(row)}")
        for row, colour in zip(ran, cycle(COLOURS), strict=False)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _word(row: CompareRow) -> str:
    return "FAIL" if row.failed else "pass"


def _times(ax: Axes, ran: list[CompareRow]) -> None:
    height = 0.38
    for index, (row, colour) in enumerate(zip(ran, cycle(COLOURS), strict=False)):
        for shift, what, alpha in ((-height / 2, "forward", 1.0), (height / 2, "forward_backward", 0.55)):
            value = row.milliseconds(what)
            if value is not None:
                ax.barh(index + shift, value, height, color=colour, alpha=alpha)
                ax.text(value, index + shift, f" {value:.1f}", va="center", fontsize=8)
    _finish(ax, ran, "median time of a call (ms)\ndark: forward; light: with backward")


def _memory(ax: Axes, ran: list[CompareRow]) -> None:
    for index, (row, colour) in enumerate(zip(ran, cycle(COLOURS), strict=False)):
        if row.peak_mib is not None:
            ax.barh(index, row.peak_mib, 0.5, color=colour)
            ax.text(row.peak_mib, index, f" {row.peak_mib:.1f}", va="center", fontsize=8)
    _finish(ax, ran, "peak memory, with backward (MiB)")


def _finish(ax: Axes, ran: list[CompareRow], label: str) -> None:
    names = [f"{textwrap.fill(row.name, 20)}\n{_word(row)}" for row in ran]
    ax.set_yticks(range(len(ran)), names, fontsize=9)
    ax.set_ylim(max(len(ran), 3) - 0.4, -0.6)
    longest = ax.dataLim.xmax
    ax.set_xlim(0, 1.25 * longest if math.isfinite(longest) and longest > 0 else 1.0)
    ax.set_xlabel(label, loc="right")  # centred it would pass the edge of the picture
    ax.spines[["top", "right"]].set_visible(False)
