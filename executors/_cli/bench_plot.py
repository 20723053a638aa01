"""The picture of a benchmark: speed against transformers' best, over T."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from executors._cli.bench import WITH_BACKWARD, Case
from executors._cli.bench_measure import Spread
from executors._cli.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
WIDEST = 0.7  # of the space between two T, for all contenders side by side
MARKERS = "osD^vP"


def plot(path: Path, cases: list[Case], title: str) -> None:
    """Writes the picture, whole or not at all: a row for each layer and direction, a column for each routing."""
    panels = {key: list(group) for key, group in groupby(cases, _key)}
    lines = list(dict.fromkeys((name, direction) for name, direction, _ in panels))
    routings = list(dict.fromkeys(routing for _, _, routing in panels))
    names = list(dict.fromkeys(row.name for case in cases for row in case.rows if row.seconds))
    figure, axes = plt.subplots(
        len(lines),
        len(routings),
        figsize=(2.2 + 3.6 * len(routings), 1.6 + 2.9 * len(lines)),
        dpi=130,
        layout="constrained",
        sharey="row",
        squeeze=False,
    )
    for i, (layer, direction) in enumerate(lines):
        for j, routing in enumerate(routings):
            found = panels.get((layer, direction, routing))
            if found is None:
                axes[i, j].set_axis_off()
            else:
                _panel(axes[i, j], found, names, _limits([c for c in cases if _key(c)[:2] == (layer, direction)]))
                axes[i, j].set_title(f"{layer}, {_direction(direction)}\n{routing} routing", fontsize=9)
        axes[i, 0].set_ylabel("times as fast as\ntransformers' best", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)


def _limits(cases: list[Case]) -> tuple[float, float]:
    """Of the ratio's axis: everything in sight, and at least from 0.45 to 2.2."""
    found = [ratio for case in cases for row in case.rows if (ratio := case.ratio(row))]
    return min([0.45, *(r.low / 1.2 for r in found)]), max([2.2, *(r.high * 1.2 for r in found)])


def _panel(ax: Axes, cases: list[Case], names: list[str], limits: tuple[float, float]) -> None:
    places = np.arange(len(cases), dtype=float)
    for place, case in zip(places, cases, strict=True):
        control = case.control()
        if control is not None:
            within = max(1 / control.low, control.low, 1 / control.high, control.high)
            label = "a contender against itself (no result)" if place == 0 else None
            ax.fill_between([place - 0.46, place + 0.46], 1 / within, within, color="#cccccc", linewidth=0, label=label)
    ax.axhline(1.0, color="black", linewidth=0.8)
    step = WIDEST / max(len(names), 1)
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * step
        found = [(place, ratio) for place, case in zip(places, cases, strict=True) if (ratio := _ratio(case, name))]
        x = [place + shift for place, _ in found]
        y = [ratio.median for _, ratio in found]
        whiskers = [[r.median - r.low for _, r in found], [r.high - r.median for _, r in found]]
        ax.errorbar(
            x, y, whiskers, fmt=MARKERS[number % len(MARKERS)], markersize=5, capsize=2, linewidth=1.1,
            color=COLOURS[number % len(COLOURS)], label=name,
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_yticks(TICKS)
    ax.set_ylim(*limits)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(places, [f"T={case.tokens}" for case in cases], fontsize=9)
    ax.set_xlim(-0.5, len(cases) - 0.5)
    ax.tick_params(axis="y", labelsize=9)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _ratio(case: Case, name: str) -> Spread | None:
    return next((case.ratio(row) for row in case.rows if row.name == name), None)


def _key(case: Case) -> tuple[str, str, str]:
    return case.shape.name, case.direction, case.routing


def _direction(direction: str) -> str:
    return "forward + backward" if direction == WITH_BACKWARD else "forward"
