"""What the pictures of benchmarks have in common: panels in rows and columns, above one legend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from executors._compare import plot as plot_of_one_layer

MARKERS = "osD^vPX*<>"
COLOURS = (*plot_of_one_layer.COLOURS, "#777777", "#8b5a2b", "#000000", "#7b3fa0")  # as many as markers
AS_IT_IS = FuncFormatter(lambda value, _: f"{value:g}")


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, Any]:
    """A figure and its axes, [rows, columns]."""
    figure = Figure(figsize=size, dpi=plot_of_one_layer.DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def tidy(ax: Axes, axis: Any = "both") -> None:
    """Draws the grid behind the data, and no frame on the right and above."""
    ax.tick_params(axis=axis, labelsize=9)
    ax.grid(axis=axis, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def ratio_limits(ratios: list[Any]) -> tuple[float, float]:
    """Limits of an axis of ratios: everything in sight, and at least from 0.45 to 2.2."""
    return min([0.45, *(r.low / 1.2 for r in ratios)]), max([2.2, *(r.high * 1.2 for r in ratios)])


def finish(figure: Figure, axes: Any, title: str, columns: int, path: Path) -> None:
    """Adds the title and a legend of so many columns, with each label once, and writes the picture."""
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10)
    plot_of_one_layer.save(figure, path)
