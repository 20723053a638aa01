"""The picture of a fine-tune: losses, how far they are apart, and beside them speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from executors._compare.plot import COLOURS, save
from qlora.report import MIB, PARITY, Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-6  # nats; equal losses are drawn there


def plot(path: Path, results: Results, title: str) -> None:
    """Writes the picture, whole or not at all."""
    figure = Figure(figsize=(10.5, 6.4), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.6, 1])[0]
    above, below = left.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
    everyone = results.contenders
    _losses(above, results)
    _apart(below, results)
    speed, memory = right.subplots(2, 1)
    _bars(speed, everyone, [own.tokens_per_second for own in everyone], f"{results.unit}s per second", "{:.0f}")
    peaks = [None if own.peak is None else own.peak / MIB for own in everyone]
    _bars(memory, everyone, peaks, "peak of a step above the model (MiB)", "{:.0f}")
    save(figure, path)


def _losses(ax: Axes, results: Results) -> None:
    if results.exact is not None:
        steps = range(1, len(results.exact) + 1)
        ax.plot(steps, results.exact, color="black", linewidth=1, label="all but the 4 bits in fp32")
    for place, own in enumerate(results.contenders):
        steps = range(1, len(own.losses) + 1)
        ax.plot(steps, own.losses, marker="osD^v"[place % 5], label=own.name, **_style(place, 8 - 2 * place))
    ax.set_ylabel(f"loss (nats per {results.unit})")
    ax.set_title("losses: equal runs lie inside one another", fontsize=10)
    ax.legend(fontsize=9, frameon=False)
    _finish(ax)


def _apart(ax: Axes, results: Results) -> None:
    """From the run in fp32, or from the first contender where there is none."""
    against = results.contenders[0].losses if results.exact is None else results.exact
    name = results.contenders[0].name if results.exact is None else "fp32"
    ax.axhline(PARITY, color="#888888", linewidth=1, linestyle="--", label=f"{PARITY} nats")
    for place, own in enumerate(results.contenders):
        if own.losses is not against:
            apart = [max(abs(a - b), LEAST) for a, b in zip(own.losses, against, strict=True)]
            style = _style(place, 5)
            ax.plot(range(1, len(apart) + 1), apart, marker="osD^v"[place % 5], label=own.name, **style)
    ax.set_yscale("log")
    ax.set_ylabel(f"nats apart from {name}")
    ax.set_xlabel("optimiser step")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9, frameon=False, borderaxespad=0)
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
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.spines[["top", "right"]].set_visible(False)
