"""The picture of a fine-tune: losses, how far they are apart, and beside them speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from executors._compare.plot import COLOURS, save
from qlora.report import MIB, PARITY, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-6  # nats; equal losses are drawn there


def plot(path: Path, results: list[Result], unit: str, title: str) -> None:
    """Writes the picture, whole or not at all."""
    figure = Figure(figsize=(10.5, 6.4), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.6, 1])[0]
    above, below = left.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
    _losses(above, results, unit)
    _apart(below, results)
    speed, memory = right.subplots(2, 1)
    _bars(speed, results, [own.tokens_per_second for own in results], f"{unit}s per second", "{:.0f}")
    peaks = [None if own.peak is None else own.peak / MIB for own in results]
    _bars(memory, results, peaks, "peak of a step above the model (MiB)", "{:.0f}")
    save(figure, path)


def _losses(ax: Axes, results: list[Result], unit: str) -> None:
    for place, own in enumerate(results):
        steps = range(1, len(own.losses) + 1)
        ax.plot(steps, own.losses, marker="osD^v"[place % 5], label=own.name, **_style(place, 8 - 2 * place))
    ax.set_ylabel(f"loss (nats per {unit})")
    ax.set_title("losses: equal runs lie inside one another", fontsize=10)
    ax.legend(fontsize=9, frameon=False)
    _finish(ax)


def _apart(ax: Axes, results: list[Result]) -> None:
    first = results[0]
    ax.axhline(PARITY, color="#888888", linewidth=1, linestyle="--", label=f"allowed: {PARITY}")
    for place, own in enumerate(results[1:], start=1):
        apart = [max(abs(a - b), LEAST) for a, b in zip(own.losses, first.losses, strict=True)]
        ax.plot(range(1, len(apart) + 1), apart, marker="osD^v"[place % 5], **_style(place, 5), label=own.name)
    ax.set_yscale("log")
    ax.set_ylabel(f"apart from {first.name}")
    ax.set_xlabel("optimiser step")
    ax.legend(fontsize=9, frameon=False)
    _finish(ax)


def _bars(ax: Axes, results: list[Result], values: list[Any], title: str, form: str) -> None:
    names = [own.name for own in results]
    heights = [0 if value is None else value for value in values]
    bars = ax.barh(names, heights, color=[COLOURS[place % len(COLOURS)] for place in range(len(names))])
    ax.bar_label(bars, ["not measured" if v is None else form.format(v) for v in values], padding=3, fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


def _style(place: int, size: float) -> dict[str, Any]:
    colour = COLOURS[place % len(COLOURS)]
    return {"color": colour, "markersize": max(size, 3), "markerfacecolor": "none", "linewidth": 1}


def _finish(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
