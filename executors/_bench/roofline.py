"""The picture of how far contenders are from the machine's ceilings: TFLOP/s over T, and GB/s of decoding steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from executors._bench.case import FORWARD, LORA, WITH_BACKWARD, BenchCase, BenchRow
from executors._bench.ceilings import Ceilings
from executors._bench.figure import AS_IT_IS, COLOURS, MARKERS, finish, panels, tidy
from executors._bench.measure import spread
from executors._bench.table import DIRECTIONS, rates
from executors._bench.timing import DECODE

IN_A_GRAPH = " in a graph"


def plot(path: Path, cases: list[BenchCase], ceilings: Ceilings, title: str) -> None:
    """Writes the picture: a row for each layer, for the first routing that was measured.

    Args:
        path: the file.
        cases: those with adapters have a panel only where no others have backward.
        ceilings: the machine's.
        title: above all.
    """
    routing = cases[0].routing
    cases = [case for case in cases if case.routing == routing]
    layers = list(dict.fromkeys(case.shape.name for case in cases))
    names = list(dict.fromkeys(row.name for case in cases for row in case.rows if row.seconds))
    figure, axes = panels(len(layers), 3, (13.0, 1.6 + 3.2 * len(layers)))
    for line, layer in zip(axes, layers, strict=True):
        own = [case for case in cases if case.shape.name == layer]
        backward = WITH_BACKWARD if any(case.direction == WITH_BACKWARD for case in own) else LORA
        for ax, direction in zip(line, (FORWARD, backward), strict=False):
            found = [case for case in own if case.direction == direction]
            _speed_panel(ax, found, names, ceilings)
            ax.set_title(f"{layer}, {DIRECTIONS[direction]}\nTFLOP/s, {routing} routing", fontsize=9)
        _decode_panel(line[2], [c for c in own if c.direction == FORWARD and c.tokens <= DECODE], names, ceilings)
        line[2].set_title(f"{layer}, forward, T up to {DECODE}\nshare of a large copy's GB/s", fontsize=9)
    finish(figure, axes, title, 4, path)


def _speed_panel(ax: Axes, cases: list[BenchCase], names: list[str], ceilings: Ceilings) -> None:
    """TFLOP/s by T under the product's ceiling and under the roof of both ceilings."""
    if not cases:
        ax.set_axis_off()
        return
    places = range(len(cases))
    roof = [ceilings.attainable(case.flops, case.bytes_moved) for case in cases]
    ax.axhline(ceilings.tflops, color="black", linewidth=1.0, label=f"{ceilings.product} product of large matrices")
    ax.plot(places, roof, color="black", linewidth=1.0, linestyle="--", label="roof: that product, or the copy's bytes")
    _lines(ax, cases, names, lambda case, row: rates(case, spread(row.seconds))[0])
    ax.set_ylim(0.0, 1.1 * ceilings.tflops)
    ax.yaxis.set_major_formatter(AS_IT_IS)
    _finish(ax, cases)


def _decode_panel(ax: Axes, cases: list[BenchCase], names: list[str], ceilings: Ceilings) -> None:
    """The share of the copy's bandwidth: calls as they are, and in a graph."""
    if not cases:
        ax.set_axis_off()
        return
    ax.axhline(1.0, color="black", linewidth=1.0)

    def share(case: BenchCase, seconds: list[float]) -> float:
        return rates(case, spread(seconds))[1] / ceilings.copy_gbs

    _lines(ax, cases, names, lambda case, row: share(case, row.seconds))
    for number, name in enumerate(names):
        rows = [(place, case, row) for place, case in enumerate(cases) for row in case.rows if row.name == name]
        found = [(place, share(case, row.graph)) for place, case, row in rows if row.graph]
        if found:
            style = _style(number) | {"linestyle": ":", "markerfacecolor": "white"}
            ax.plot(*zip(*found, strict=True), **style, label=name + IN_A_GRAPH)
    ax.set_ylim(0.0, max(1.1, ax.get_ylim()[1]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    _finish(ax, cases)


def _lines(
    ax: Axes, cases: list[BenchCase], names: list[str], value_of: Callable[[BenchCase, BenchRow], float]
) -> None:
    """A line for each contender that was timed; interpreted ones are crosses: no measurement."""
    for number, name in enumerate(names):
        rows = [(place, case, row) for place, case in enumerate(cases) for row in case.rows if row.name == name]
        found = [(place, value_of(case, row)) for place, case, row in rows if row.seconds]
        if found:
            style, label = _style(number), name
            if any(row.interpreted for _, _, row in rows):
                style, label = style | {"marker": "x", "linestyle": "none"}, f"{name}: interpreted, no measurement"
            ax.plot(*zip(*found, strict=True), **style, label=label)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.2,
    }


def _finish(ax: Axes, cases: list[BenchCase]) -> None:
    ax.set_xticks(range(len(cases)), [f"T={case.tokens}" for case in cases], fontsize=9)
    ax.set_xlim(-0.3, len(cases) - 0.7)
    tidy(ax, "y")
