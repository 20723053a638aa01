"""The picture of a layer's counts: the least time of each unit, and what the issue slots are spent on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from executors._bench.figure import panels, tidy
from executors._compare.plot import save
from executors._counts.bounds import UNITS, bounds, issued
from executors._counts.report import notable
from executors._counts.run import LayerCounts
from moe_ref.conformance.ptx.counters import KernelCounts

MICROSECOND = 1e-6
HEIGHT = 0.165  # of a bar; kernels are 1 apart
TENSOR, SHARED, GLOBAL = "#0072b2", "#56b4e9", "#e69f00"  # in both panels
COLOURS = {"issue": "#444444", "tensor": TENSOR, "shared": SHARED, "l2": GLOBAL, "dram": "#d55e00"}
GROUPS = {  # of kinds of instructions, with their colours
    "mma": (("tensor",), TENSOR),
    "integers": (("integer",), "#8b5a2b"),
    "floats": (("float",), "#009e73"),
    "conversions": (("convert",), "#cc79a7"),
    "predicates, branches": (("predicate", "branch"), "#bbbbbb"),
    "shared memory, ldmatrix": (("shared", "ldmatrix"), SHARED),
    "global memory, copies": (("global", "copy"), GLOBAL),
    "barriers, lanes, other": (("barrier", "lanes", "other"), "#666666"),
}


def plot(path: Path, found: LayerCounts, title: str) -> None:
    """Writes the picture."""
    times = {label: bounds(counts, found.plan.card) for label, counts in found.kernels.items()}
    shown = notable(found)
    figure, axes = panels(1, 2, (11.0, 2.0 + 0.62 * max(len(shown), 3)), width_ratios=[1.5, 1])
    left, right = axes[0]
    _times(left, {label: times[label] for label in shown})
    left.set_title(f"{found.plan.card.title}: least time of each unit, µs; the longest marked", fontsize=9)
    _kinds(right, {label: found.kernels[label] for label in shown})
    right.set_title("instructions that are issued", fontsize=9)
    missing = [label for label in times if label not in shown]
    note = f"\nbelow 1% of the longest and left out: {', '.join(missing)}" if missing else ""
    figure.suptitle(title + note, fontsize=10)
    save(figure, path)


def _times(ax: Axes, times: dict[str, dict[str, float]]) -> None:
    """Five bars for each kernel; the longest is marked, and has its time behind it."""
    for number, (unit, name) in enumerate(UNITS.items()):
        places = np.arange(len(times)) + (number - (len(UNITS) - 1) / 2) * HEIGHT
        for place, own in zip(places, times.values(), strict=True):
            width, marked = own[unit] / MICROSECOND, own[unit] == max(own.values())
            alpha, label = (1.0 if marked else 0.55), (name if place == places[0] else None)
            ax.barh(place, width, 0.92 * HEIGHT, color=COLOURS[unit], alpha=alpha, label=label)
            if marked:
                ax.text(width, place, f" {width:.3g} {name}", va="center", fontsize=8, fontweight="bold")
    ax.set_xlim(0.0, 1.27 * max(max(own.values()) for own in times.values()) / MICROSECOND)
    _finish(ax, list(times), 3)
    for handle in ax.get_legend().legend_handles:  # type: ignore[union-attr]
        handle.set_alpha(1.0)  # type: ignore[union-attr]


def _kinds(ax: Axes, kernels: dict[str, KernelCounts]) -> None:
    """One bar for each kernel, divided; behind it the instructions for each tensor-core instruction."""
    begin = np.zeros(len(kernels))
    for name, (kinds, colour) in GROUPS.items():
        widths = np.array([own.total("warps", *kinds) / issued(own) for own in kernels.values()])
        ax.barh(np.arange(len(kernels)), widths, 4 * HEIGHT, left=begin, color=colour, label=name)
        begin += widths
    for place, own in enumerate(kernels.values()):
        products = own.total("warps", "tensor")
        text = f" {issued(own) / products:.3g} / mma" if products else " no mma"
        ax.text(1.0, place, text, va="center", fontsize=8)
    ax.set_xlim(0.0, 1.22)
    ax.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    _finish(ax, [""] * len(kernels), 2)


def _finish(ax: Axes, names: list[str], columns: int) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(max(len(names), 3) - 0.45, -0.55)
    tidy(ax, "x")
    ax.tick_params(axis="y", labelsize=9, length=0)
    ax.xaxis.set_ticks_position("bottom")
    below = -0.35 / max(len(names), 3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=columns, fontsize=8, frameon=False)


def title_of(found: LayerCounts) -> str:
    """One line on the layer."""
    plan = found.plan
    return (
        f"{plan.shape.name}, {plan.weights}, {plan.active} experts, {plan.rows} rows of each (T={plan.counted_tokens})"
    )
