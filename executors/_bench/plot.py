"""The picture of a benchmark: speed against the peers over T, and the peak memory beside it where it was measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from executors._bench.case import BenchCase, BenchRow
from executors._bench.figure import AS_IT_IS, COLOURS, MARKERS, finish, panels, ratio_limits, tidy
from executors._bench.measure import Spread
from executors._bench.table import DIRECTIONS, MIB

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
WIDEST = 0.7  # of the space between two T, for all contenders side by side
GREY = "#cccccc"
MEMORY = "memory"  # in place of a routing, in the last column
DECODED = (("all experts decoded", "--"), ("active experts decoded", ":"))

Places = Callable[[BenchCase, BenchRow], Spread | None]


def plot(path: Path, cases: list[BenchCase], title: str) -> None:
    """Writes the picture: a row for each layer and direction, a column for each routing."""
    groups = {key: list(group) for key, group in groupby(cases, _key)}
    lines = list(dict.fromkeys((name, direction) for name, direction, _ in groups))
    columns = list(dict.fromkeys(routing for _, _, routing in groups))
    if any(row.peak is not None for case in cases for row in case.rows):
        columns.append(MEMORY)
    names = list(dict.fromkeys(row.name for case in cases for row in case.rows if row.seconds))
    figure, axes = panels(len(lines), len(columns), (2.2 + 3.6 * len(columns), 1.6 + 2.9 * len(lines)))
    for i, (layer, direction) in enumerate(lines):
        row = [case for case in cases if _key(case)[:2] == (layer, direction)]
        for j, column in enumerate(columns):
            found = groups.get((layer, direction, column), [])
            if column == MEMORY:
                _memory_panel(axes[i, j], [case for case in row if case.routing == row[0].routing], names)
            elif found:
                speed_panel(axes[i, j], found, names, _limits(row), _comparison(found)[1])
                axes[i, j].set_title(f"{layer}, {DIRECTIONS[direction]}\n{column} routing", fontsize=9)
            else:
                axes[i, j].set_axis_off()
        axes[i, 0].set_ylabel(f"times as fast as\n{_comparison(row)[0]}", fontsize=9)
    finish(figure, axes, title, min(4, 2 * len(columns)), path)


def _comparison(cases: list[BenchCase]) -> tuple[str, Places]:
    """Whom a row of panels compares with, and the ratio to it."""
    if all(case.stack_row() for case in cases):
        return cases[0].stack, BenchCase.stack_ratio
    return "the fastest peer", BenchCase.ratio


def _limits(cases: list[BenchCase]) -> tuple[float, float]:
    _, ratio_of = _comparison(cases)
    return ratio_limits([ratio for case in cases for row in case.rows if (ratio := ratio_of(case, row))])


def speed_panel(
    ax: Axes, cases: list[BenchCase], names: list[str], limits: tuple[float, float], value_of: Places
) -> None:
    """The ratios of all contenders at each T, over the noise."""
    for place, case in enumerate(cases):
        control = case.control()
        if control is not None:
            within = max(1 / control.low, control.low, 1 / control.high, control.high)
            label = "a contender against itself (no result)" if place == 0 else None
            ax.fill_between([place - 0.46, place + 0.46], 1 / within, within, color=GREY, linewidth=0, label=label)
    ax.axhline(1.0, color="black", linewidth=0.8)
    _points(ax, cases, names, value_of)
    ax.set_yticks(TICKS)
    ax.set_ylim(*limits)
    ax.yaxis.set_major_formatter(AS_IT_IS)
    ax.yaxis.set_minor_locator(NullLocator())


def _memory_panel(ax: Axes, cases: list[BenchCase], names: list[str]) -> None:
    for place, case in enumerate(cases):
        for size, (label, style) in zip(reversed(case.decoded()), DECODED, strict=True):
            ax.plot(
                [place - 0.46, place + 0.46], [size / MIB] * 2, color="black", linewidth=1.0, linestyle=style,
                label=label if place == 0 and case.stack else None,
            )  # fmt: skip
    _points(ax, cases, names, _peak)
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.5, high * 1.5)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high < 100 * low else LogLocator())
    ax.yaxis.set_major_formatter(AS_IT_IS)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_title("peak memory of a call, MiB\nabove layer and input", fontsize=9)


def _peak(case: BenchCase, row: BenchRow) -> Spread | None:
    return None if not row.peak else Spread(*[row.peak / MIB] * 3)


def _points(ax: Axes, cases: list[BenchCase], names: list[str], value_of: Places) -> None:
    """All contenders side by side at each T."""
    places = np.arange(len(cases), dtype=float)
    step = WIDEST / max(len(names), 1)
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * step
        rows = [(place, case, row) for place, case in zip(places, cases, strict=True) for row in case.rows]
        found = [(place, value) for place, case, row in rows if row.name == name and (value := value_of(case, row))]
        y = [value.median for _, value in found]
        whiskers = [[v.median - v.low for _, v in found], [v.high - v.median for _, v in found]]
        ax.errorbar(
            [place + shift for place, _ in found], y, whiskers, fmt=MARKERS[number % len(MARKERS)], markersize=5,
            capsize=2, linewidth=1.1, color=COLOURS[number % len(COLOURS)], label=name,
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xticks(places, [f"T={case.tokens}" for case in cases], fontsize=9)
    ax.set_xlim(-0.5, len(cases) - 0.5)
    tidy(ax, "y")


def _key(case: BenchCase) -> tuple[str, str, str]:
    return case.shape.name, case.direction, case.routing
