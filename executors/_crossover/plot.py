"""The picture of a crossover: how much longer decoding before the products takes than in them, over rows per expert."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from executors._bench.figure import AS_IT_IS, COLOURS, MARKERS, finish, panels, ratio_limits, tidy
from executors._bench.measure import Spread
from executors._crossover.points import DECODED, CrossoverCurve
from executors._crossover.report import DIRECTIONS, conditions
from executors._crossover.run import CrossoverPlan

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
GREY = "#666666"


def plot(path: Path, curves: list[CrossoverCurve], plan: CrossoverPlan) -> None:
    """Writes the picture: a row for each layer, a column for each direction."""
    layers = list(dict.fromkeys(curve.shape.name for curve in curves))
    directions = list(dict.fromkeys(curve.direction for curve in curves))
    formats = list(dict.fromkeys(curve.weights for curve in curves))
    size = (1.2 + 4.6 * len(directions), 1.7 + 3.0 * len(layers))
    figure, axes = panels(len(layers), len(directions), size, sharex=True, sharey="row")
    for line, layer in zip(axes, layers, strict=True):
        limits = _limits([curve for curve in curves if curve.shape.name == layer])
        for ax, direction in zip(line, directions, strict=True):
            own = [curve for curve in curves if (curve.shape.name, curve.direction) == (layer, direction)]
            _panel(ax, own, formats, plan, limits)
            ax.set_title(f"{layer}\n{DIRECTIONS[direction]}", fontsize=9)
        line[0].set_ylabel("time over that of\ndecoding in the products", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("mean rows per expert", fontsize=9)
    means = "\ninterpreted kernels: times mean nothing" if plan.interpreted else ""
    finish(figure, axes, conditions(plan) + means, 2 if len(directions) == 1 else 4, path)


def _limits(curves: list[CrossoverCurve]) -> tuple[float, float]:
    return ratio_limits([ratio for curve in curves for name in (DECODED, "bf16") for ratio in _line(curve, name)[1]])


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
        axis.set_major_formatter(AS_IT_IS)
        axis.set_minor_locator(NullLocator())
    tidy(ax)


def _line(curve: CrossoverCurve, name: str) -> tuple[list[float], list[Spread]]:
    found = [(point.rows, ratio) for point in curve.points if (ratio := point.ratio(name))]
    return [rows for rows, _ in found], [ratio for _, ratio in found]
