"""The picture of a crossover: how much longer decoding before the products takes than in them, over rows per expert."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

from executors._bench.measure import Spread
from executors._compare import report
from executors._compare.plot import COLOURS
from executors._crossover.points import DECODED, CrossoverCurve
from executors._crossover.report import DIRECTIONS
from executors._crossover.run import CrossoverPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
MARKERS = "osD^"
GREY = "#666666"


def plot(path: Path, curves: list[CrossoverCurve], plan: CrossoverPlan) -> None:
    """Writes the picture, whole or not at all: a row for each layer, a column for each direction."""
    layers = list(dict.fromkeys(curve.shape.name for curve in curves))
    directions = list(dict.fromkeys(curve.direction for curve in curves))
    formats = list(dict.fromkeys(curve.weights for curve in curves))
    figure, axes = plt.subplots(
        len(layers),
        len(directions),
        figsize=(1.2 + 4.6 * len(directions), 1.7 + 3.0 * len(layers)),
        dpi=130,
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for line, layer in zip(axes, layers, strict=True):
        limits = _limits([curve for curve in curves if curve.shape.name == layer])
        for ax, direction in zip(line, directions, strict=True):
            own = [curve for curve in curves if (curve.shape.name, curve.direction) == (layer, direction)]
            _panel(ax, own, formats, plan, limits)
            ax.set_title(f"{layer}\n{DIRECTIONS[direction]}", fontsize=9)
        line[0].set_ylabel("time over that of\ndecoding in the products", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("mean rows per expert", fontsize=9)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = 2 if len(directions) == 1 else 4
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    figure.suptitle(_title(plan), fontsize=10)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)


def _title(plan: CrossoverPlan) -> str:
    found = report.machine()
    where = found["gpu"] if plan.device.startswith("cuda") else found["processor"]
    means = "\ninterpreted kernels: times mean nothing" if plan.interpreted else ""
    return f"{where}, torch {found['torch']}, Triton {found['triton']}; {plan.routing} routing{means}"


def _limits(curves: list[CrossoverCurve]) -> tuple[float, float]:
    """Of the ratio's axis: everything in sight, and at least from 0.45 to 2.2."""
    found = [ratio for curve in curves for name in (DECODED, "bf16") for ratio in _line(curve, name)[1]]
    return min([0.45, *(r.low / 1.2 for r in found)]), max([2.2, *(r.high * 1.2 for r in found)])


def _panel(
    ax: Axes, curves: list[CrossoverCurve], formats: list[str], plan: CrossoverPlan, limits: tuple[float, float]
) -> None:
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.axvline(
        plan.rule.rows, color=GREY, linewidth=1.0, linestyle="--", label=f"the rule now: {plan.rule.rows:g} rows"
    )
    for curve in curves:
        number = formats.index(curve.weights)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        rows, ratios = _line(curve, DECODED)
        ax.plot(
            rows, [r.median for r in ratios], marker, linestyle="-", color=colour, markersize=4, linewidth=1.3,
            label=f"{curve.weights}: decoded before",
        )  # fmt: skip
        ax.fill_between(rows, [r.low for r in ratios], [r.high for r in ratios], color=colour, alpha=0.2, linewidth=0)
        rows, ratios = _line(curve, "bf16")
        ax.plot(
            rows, [r.median for r in ratios], linestyle=":", color=colour, linewidth=1.2,
            label=f"{curve.weights}: bf16 weights",
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_yticks(TICKS)
    ax.set_ylim(*limits)
    ax.xaxis.set_major_locator(FixedLocator(plan.rows))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    ax.tick_params(labelsize=9)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _line(curve: CrossoverCurve, name: str) -> tuple[list[float], list[Spread]]:
    found = [(point.rows, ratio) for point in curve.points if (ratio := point.ratio(name))]
    return [rows for rows, _ in found], [ratio for _, ratio in found]
