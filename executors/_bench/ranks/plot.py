"""The picture of ``bench --ranks``: speed against one process with one thread."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from executors._bench.case import BenchCase, BenchRow
from executors._bench.figure import finish, panels, ratio_limits
from executors._bench.measure import Spread
from executors._bench.plot import speed_panel
from executors._bench.ranks.measure import RankRow
from executors._bench.ranks.table import to_one
from executors._bench.table import DIRECTIONS

LEGEND = 3  # columns


def plot(path: Path, cases: list[BenchCase], title: str) -> None:
    """Writes the picture: a row for each layer and routing, a column for each direction."""

    def places(case: BenchCase, row: BenchRow) -> Spread | None:
        found = to_one(case, row, 1) if isinstance(row, RankRow) else None
        return None if found is None else found[0]

    groups = {key: list(own) for key, own in groupby(cases, _key)}
    lines = list(dict.fromkeys(key[:2] for key in groups))
    columns = list(dict.fromkeys(key[2] for key in groups))
    compared = [ratio for case in cases for row in case.rows if (ratio := places(case, row))]
    names = list(dict.fromkeys(row.name for case in cases for row in case.rows if places(case, row)))
    figure, axes = panels(len(lines), len(columns), (1.6 + 4.2 * len(columns), 2.6 + 2.9 * len(lines)))
    for i, (layer, routing) in enumerate(lines):
        for j, direction in enumerate(columns):
            found = groups.get((layer, routing, direction), [])
            speed_panel(axes[i, j], found, names, ratio_limits(compared), places)
            axes[i, j].set_title(f"{layer}, {routing} routing\n{DIRECTIONS[direction]}", fontsize=9)
        axes[i, 0].set_ylabel("times as fast as\none process with 1 thread", fontsize=9)
    finish(figure, axes, title, LEGEND, path)


def _key(case: BenchCase) -> tuple[str, str, str]:
    return case.shape.name, case.routing, case.direction
