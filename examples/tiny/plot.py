"""The picture: losses, and how far they are from the exact ones beside how far they may be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from executors._compare.plot import COLOURS, save
from tiny.judgement import LIMIT
from tiny.report import Contender, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP"
BAND, DEVIATION, WRONG = "#dddddd", "#888888", "#a00000"
DASHES = ("--", ":", "-.")


def plot(path: Path, results: Results, title: str) -> None:
    """Writes the picture, whole or not at all."""
    figure = Figure(figsize=(8.2, 9.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.6])
    _losses(above, results)
    _differences(below, results)
    save(figure, path)


def _losses(ax: Axes, results: Results) -> None:
    steps = _steps(results)
    ax.plot(steps, results.exact.losses, color="black", linewidth=1, label="exact experts (specification, float64)")
    for place, contender in enumerate(_executors(results)):
        losses = (contender.free or contender.run).losses
        ax.plot(steps, losses, linestyle="none", label=_label(contender), alpha=0.8, **_marker(place, 9 - 3 * place))
    ax.set_ylabel("loss (nats per byte)")
    ax.set_ylim(0, 1.08 * max(results.exact.losses))
    ax.set_title("Training as it is, every run choosing experts for itself", fontsize=10)
    _finish(ax)
    ax.legend(fontsize=9, frameon=False)


def _differences(ax: Axes, results: Results) -> None:
    steps, sd = _steps(results), np.asarray(results.sd)
    least = min(float(sd.min()) / 30, 1e-3 * float(sd.max()))
    ax.fill_between(steps, least, LIMIT * sd, color=BAND, linewidth=0, label=f"allowed: {LIMIT:g} deviations")
    label = f"one deviation of {len(results.honest)} honest runs"
    ax.plot(steps, sd, color=DEVIATION, linewidth=1.2, label=label)
    for place, contender in enumerate(_executors(results)):
        held = _sizes(contender.verdict.differences, least)
        ax.plot(steps, held, linewidth=1, label=_label(contender), **_marker(place, 8 - 2.5 * place))
    for place, contender in enumerate(_executors(results)):
        if contender.free is not None and contender.free.losses != contender.run.losses:
            apart = _sizes(np.subtract(contender.free.losses, results.exact.losses), least)
            colour = COLOURS[place % len(COLOURS)]
            label = f"{contender.name}, choosing for itself"
            ax.plot(steps, apart, ":", linewidth=2.2 - 0.9 * place, color=colour, label=label)
    for place, contender in enumerate(c for c in results.contenders if c.wrong):
        sizes = _sizes(contender.verdict.differences, least)
        label = f"wrong on purpose: {contender.name}"
        ax.plot(steps, sizes, DASHES[place % len(DASHES)], color=WRONG, linewidth=1.3, label=label)
    ax.set_yscale("log")
    ax.set_ylim(bottom=least)
    ax.set_ylabel("difference from the exact loss, size")
    ax.set_xlabel("optimiser step")
    ax.set_title("Held to the exact run's choices of experts: what rounding alone does", fontsize=10)
    _finish(ax)
    ax.set_xlim(0.5, len(steps) + 0.5)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=2, fontsize=9, frameon=False)


def _finish(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.spines[["top", "right"]].set_visible(False)


def _executors(results: Results) -> list[Contender]:
    return [contender for contender in results.contenders if not contender.wrong]


def _label(contender: Contender) -> str:
    return f"{contender.name} (interpreted)" if contender.interpreted else contender.name


def _marker(place: int, size: float) -> dict[str, Any]:
    """Hollow, and each smaller than the one before, so that equal runs show one inside the other."""
    colour = COLOURS[place % len(COLOURS)]
    marker = MARKERS[place % len(MARKERS)]
    return {"marker": marker, "markersize": max(size, 3), "markerfacecolor": "none", "color": colour}


def _sizes(differences: Any, least: float) -> np.ndarray:
    """Magnitudes for a logarithmic axis: what is smaller than the least lies on it."""
    return np.maximum(np.abs(np.asarray(differences, dtype=float)), least)


def _steps(results: Results) -> np.ndarray:
    return np.arange(1, len(results.exact.losses) + 1)
