"""Draws docs/images/architecture.png: the rooms, who may look into whom, and the way of two calls.

python docs/images/architecture.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).with_suffix(".png")
NATIVE, TRITON, SHARED, ROOM = "#0072b2", "#d55e00", "#555555", "#eeeeee"
WIDTH, HEIGHT, GAP = 2.9, 0.62, 0.38
# Steps of a call: column, level from the top, file, what happens there.
STEPS = (
    ("shared", 0, "_registry.py", 'finds "native", "triton"'),
    ("native", 1, "native.py", "one executor, one file"),
    ("triton", 1, "triton.py", "one executor, one file"),
    ("shared", 2, "_base/executor.py", "checks, chooses experts"),
    ("shared", 3, "_base/operator.py", "a custom operator of torch"),
    ("native", 4, "_pipeline/operator.py", "sorts slots by expert"),
    ("triton", 4, "_triton/operator.py", "chooses tiles for the device"),
    ("native", 5, "_pipeline/layer.py", "rows, activation, combine"),
    ("triton", 5, "_triton/layer.py", "the same, in launches"),
    ("native", 6, "_pipeline/loop.py", "a product for each expert"),
    ("triton", 6, "_triton/launch/", "grids, strides, alignment"),
    ("native", 7, "_pipeline/cpu_product.py", "or torch.mm on a GPU"),
    ("triton", 7, "_triton/kernels/", "tiles"),
)
COLUMNS = {"native": 0.0, "shared": 1.7, "triton": 3.4}
COLORS = {"native": NATIVE, "shared": SHARED, "triton": TRITON}


def main() -> None:
    """Writes the picture."""
    figure, axis = plt.subplots(figsize=(7.4, 7.6), dpi=130, layout="constrained")
    for column, level, file, what in STEPS:
        box(axis, COLUMNS[column], level, file, what, COLORS[column])
    way(axis, "native", (0, 1, 2, 3, 4, 5, 6, 7))
    way(axis, "triton", (0, 1, 2, 3, 4, 5, 6, 7))
    axis.set(xlim=(-0.2, 3.4 + WIDTH + 0.2), ylim=(top(7) - HEIGHT - 0.2, 0.35))
    axis.set_axis_off()
    axis.set_title(
        "from executors.get(name)(x, router_logits, weights) to the product; y comes back the same way", fontsize=8.5
    )
    figure.savefig(OUT)


def top(level: int) -> float:
    """The upper edge of a box."""
    return -level * (HEIGHT + GAP)


def box(axis: Axes, left: float, level: int, file: str, what: str, color: str) -> None:
    """A file, and what happens in it."""
    shape = FancyBboxPatch(
        (left, top(level) - HEIGHT), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08", fc=ROOM, ec=color, lw=1.5
    )
    axis.add_patch(shape)
    middle = left + WIDTH / 2
    axis.text(middle, top(level) - 0.22, file, ha="center", va="center", fontsize=9, color=color, weight="bold")
    axis.text(middle, top(level) - 0.45, what, ha="center", va="center", fontsize=8, color="black")


def way(axis: Axes, name: str, levels: tuple[int, ...]) -> None:
    """Arrows from step to step of one call."""
    columns = {(column, level) for column, level, _, _ in STEPS}
    shift = -0.35 if name == "native" else 0.35
    for one, other in pairwise(levels):
        ends = [name if (name, level) in columns else "shared" for level in (one, other)]
        x = [COLUMNS[c] + WIDTH / 2 + (shift if c == "shared" else 0.0) for c in ends]
        axis.annotate(
            "",
            (x[1], top(other)),
            (x[0], top(one) - HEIGHT),
            arrowprops={"arrowstyle": "->", "color": COLORS[name], "lw": 1.4},
        )


if __name__ == "__main__":
    main()
