"""The picture of a plan: balance, bytes, times, and where all_to_all beats all_reduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from executors._bench.figure import AS_IT_IS, COLOURS, MARKERS, panels, tidy
from executors._compare.plot import save
from executors._plan.report import GIB, MB, MILLISECOND, heading
from executors._plan.run import PlanSettings, RanksPlan, WayCosts
from executors._plan.traffic import RESULTS, ROWS, Way

HEADROOM = 5.0  # above bars, for the legend
FEW = 16  # ranks that are marked one by one
BAR = 0.8  # of the space of a number of ranks, for all bars side by side
ROWS_COLOUR, RESULTS_COLOUR, REST_COLOUR, MEAN_COLOUR = "#0072b2", "#e69f00", "#999999", "#000000"
PRODUCTS_COLOUR = "#009e73"
TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)


def plot(path: Path, plan: PlanSettings, found: Sequence[RanksPlan]) -> None:
    """Writes the picture."""
    figure, axes = panels(2, 2, (11.0, 8.6))
    _balance(axes[0, 0], found)
    _bytes(axes[0, 1], found)
    _times(axes[1, 0], found)
    _verdict(axes[1, 1], found)
    figure.suptitle("\n".join(heading(plan)), fontsize=9)
    save(figure, path)


def _balance(ax: Axes, found: Sequence[RanksPlan]) -> None:
    """Slots of each rank over the mean, the busiest first."""
    for number, own in enumerate(found):
        slots = np.sort(own.world.received_slots)[::-1]
        places = (np.arange(own.ranks) + 0.5) / own.ranks
        ax.plot(
            places, slots / slots.mean(), marker=MARKERS[number % len(MARKERS)] if own.ranks <= FEW else None,
            markersize=4, color=COLOURS[number % len(COLOURS)],
            label=f"{own.ranks} ranks, {own.world.copies:.2f} copies of a token",
        )  # fmt: skip
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["busiest", "", "half of the ranks", "", "idlest"])
    _finish(ax, "slots of a rank's experts, over the mean")


def _bytes(ax: Axes, found: Sequence[RanksPlan]) -> None:
    """What the rank with most sends forward, by what for; a dash is the mean of all ranks."""
    parts = ((ROWS, ROWS_COLOUR), (RESULTS, RESULTS_COLOUR))
    places: list[float] = []
    names: list[str] = []
    for number, own in enumerate(found):
        for place, way in zip(_places(number, len(own.ways)), own.ways, strict=True):
            sizes = [way.forward.by_name.get(name, 0) for name, _ in parts]
            rest = sum(way.forward.by_name.values()) - sum(sizes)
            below = 0.0
            for size, (name, colour) in zip((*sizes, rest), (*parts, ("small", REST_COLOUR)), strict=True):
                label = name if not places else None
                ax.bar(place, size / MB, 0.9 * BAR / len(own.ways), below, color=colour, label=label)
                below += size / MB
            mean, half = way.forward.mean / MB, 0.45 * BAR / len(own.ways)
            ax.plot([place - half, place + half], [mean, mean], color=MEAN_COLOUR, linewidth=1.6,
                    label="mean of all ranks" if not places else None)  # fmt: skip
            places.append(place)
            names.append(_short(way.way))
    ax.set_xticks(places, names, rotation=90)
    _ranks_above(ax, found)
    _finish(ax, "MB that the rank with most has to send, forward\n(all_to_all: T of each rank; all_reduce: T in all)")


def _times(ax: Axes, found: Sequence[RanksPlan]) -> None:
    """Links of all_to_all beside products, forward and backward; memory above."""
    for number, own in enumerate(found):
        best = min(own.ways[:2], key=_both)
        pairs = zip((best.forward.seconds, best.backward.seconds), own.products, strict=True)
        for place, ((links, products), alpha) in zip(_places(number, 2), zip(pairs, (1.0, 0.55), strict=True),
                                                     strict=True):  # fmt: skip
            for shift, value, colour, name in (
                (-0.1, links, RESULTS_COLOUR, "links"),
                (0.1, products, PRODUCTS_COLOUR, "products"),
            ):
                label = f"{name}, {'forward' if alpha == 1 else 'backward'}" if number == 0 else None
                ax.bar(place + shift, value / MILLISECOND, 0.19, color=colour, alpha=alpha, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(AS_IT_IS)
    shortest = min(min(own.products[0], *(way.forward.seconds or np.inf for way in own.ways[:2])) for own in found)
    ax.set_ylim(shortest / MILLISECOND / 2, HEADROOM * ax.get_ylim()[1])
    texts = [f"{own.ranks} ranks\n{min(used.total for used in own.memory.values()) / GIB:.3g} GiB" for own in found]
    ax.set_xticks(range(len(found)), texts)
    _finish(ax, "least ms of the slowest rank under all_to_all\n(and memory of the rank that needs most)", 2)


def _verdict(ax: Axes, found: Sequence[RanksPlan]) -> None:
    """All_reduce over all_to_all by T, where all ranks have the same tokens."""
    for number, own in enumerate(found):
        ax.plot(
            list(own.same_tokens), list(own.same_tokens.values()), MARKERS[number % len(MARKERS)], linestyle="-",
            markersize=4, color=COLOURS[number % len(COLOURS)], label=f"{own.ranks} ranks",
        )  # fmt: skip
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(found[0].same_tokens)))
    ax.set_yticks(TICKS)
    ratios = [ratio for own in found for ratio in own.same_tokens.values()]
    ax.set_ylim(min(0.7, *ratios) / 1.1, max(1.5, *ratios) * 1.1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(AS_IT_IS)
        axis.set_minor_locator(NullLocator())
    ax.set_xlabel("tokens, which all ranks have, and of which all need results", fontsize=9)
    _finish(ax, "links under all_reduce over all_to_all, forward\n(above 1 all_to_all is faster)")


def _both(way: WayCosts) -> float:
    return way.forward.seconds + way.backward.seconds


def _places(number: int, count: int) -> np.ndarray:
    """Of bars beside each other."""
    return number + (np.arange(count) - (count - 1) / 2) * BAR / count


def _short(way: Way) -> str:
    return f"{way.dispatch.removeprefix('all_').replace('_', ' ')}, {way.returns}"


def _ranks_above(ax: Axes, found: Sequence[RanksPlan]) -> None:
    top = ax.get_ylim()[1]
    ax.set_ylim(0, 1.08 * top)
    for number, own in enumerate(found):
        ax.text(number, 1.02 * top, f"{own.ranks} ranks", ha="center", fontsize=9)


def _finish(ax: Axes, title: str, columns: int = 1) -> None:
    ax.set_title(title, fontsize=9)
    tidy(ax)
    ax.legend(fontsize=8, frameon=False, ncols=columns)
