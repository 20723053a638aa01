"""The tables of ``bench --ranks`` for people, in 80 columns, and its JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from executors._bench.case import BenchCase
from executors._bench.measure import Spread, is_no_result, ratios, spread
from executors._bench.peers.transformers import PREFIX, peers_version
from executors._bench.ranks.contenders import one_process, thread_counts
from executors._bench.ranks.measure import RankRow
from executors._bench.report import BUSY, commit, control_json, row_json
from executors._bench.settings import Settings
from executors._bench.table import DIRECTIONS, MILLISECONDS, max_z, relative, short
from executors._compare import report

SCHEMA = 1
NAMES = 17  # columns of the longest function

Ratio = tuple[Spread, bool]  # times as fast, and whether that is within the noise
Column = Callable[[BenchCase, RankRow], Ratio | None]


def heading(settings: Settings, ranks: int) -> list[str]:
    """The lines above all tables."""
    found = report.machine()
    version = peers_version()
    peers = f"{PREFIX} is transformers {version}" if version else "transformers is not installed: no peers"
    busy = f"other work ran here before (load {settings.load:.1f}): do not trust the times"
    weights = [f"weights: {settings.quantisation}"] if settings.quantisation else []
    return [
        f"{ranks} ranks: processes of this machine with one thread each, by gloo",
        f"{report.chip(settings.device)}, torch {found['torch']}; {peers}",
        *weights,
        "all_to_all: each rank has a part of the T tokens. all_reduce: all have all.",
        "slot, rank: what comes back. one: one process has all tokens and all experts.",
        "ms: of the slowest rank. +-: half of what lies between the 10th and 90th",
        "percentile. x hf: speed over that of transformers' expert parallelism, the",
        f"faster way. {_ones(ranks)}: over one process with so many threads, of the same",
        "executor, or for hf: the first one. All are medians. ~: no result, within the",
        "noise, which is how far the reference differs from itself (see 'again')",
        *([busy] if settings.load > BUSY else []),
    ]


def _ones(ranks: int) -> str:
    return ", ".join(f"x {threads}" for threads in thread_counts(ranks))


def tables(cases: list[BenchCase], ranks: int) -> list[tuple[str, Table]]:
    """A title and a table for each layer, routing and direction."""

    def key(case: BenchCase) -> tuple[str, str, str]:
        return case.shape.name, case.routing, case.direction

    return [(_title(group), _table(group, ranks)) for group in (list(own) for _, own in groupby(cases, key))]


def _title(cases: list[BenchCase]) -> str:
    first = cases[0]
    frozen = ", base frozen" if first.backward and first.storage.frozen else ""
    return f"{first.shape}, bfloat16\n{DIRECTIONS[first.direction]}{frozen}, {first.routing} routing"


def _table(cases: list[BenchCase], ranks: int) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    out.add_column("T", justify="right", no_wrap=True)
    out.add_column("experts on", overflow="fold", max_width=NAMES)
    out.add_column("how", no_wrap=True)
    columns = _columns(cases, ranks)
    for name in ("max z", "ms", "+-", *columns):
        out.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        for number, row in enumerate(rank_rows(case)):
            out.add_row(
                str(case.tokens) if number == 0 else "", escape(row.function), row.how, *_cells(case, row, columns)
            )
            if row.name == case.reference and case.again:
                again = spread(case.again)
                cells = "", "  again", "", "", short(MILLISECONDS * again.median), relative(again)
                out.add_row(*(f"[dim]{cell}[/dim]" if cell else "" for cell in cells))
        out.add_section()
    return out


def _columns(cases: list[BenchCase], ranks: int) -> dict[str, Column]:
    """The columns of ratios, by name."""
    peers: dict[str, Column] = {"x hf": to_peer} if any(case.best_peer() for case in cases) else {}
    return peers | {f"x {threads}": partial(to_one, threads=threads) for threads in thread_counts(ranks)}


def _cells(case: BenchCase, row: RankRow, columns: dict[str, Column]) -> list[str]:
    if row.reason:
        return ["", "[dim]not run[/dim]"]
    if row.failed:
        return [f"[red]{max_z(row)}[/red]", "[red]FAIL[/red]"]
    time = spread(row.seconds)
    compared = [_times(column(case, row)) for column in columns.values()]
    return [max_z(row), short(MILLISECONDS * time.median), relative(time), *compared]


def _times(found: Ratio | None) -> str:
    if found is None:
        return ""
    ratio, unsure = found
    return f"{'~' if unsure else ''}{ratio.median:.{2 if ratio.median < 10 else 1}f}"


def rank_rows(case: BenchCase) -> list[RankRow]:
    """The contenders."""
    return [row for row in case.rows if isinstance(row, RankRow)]


def to_peer(case: BenchCase, row: RankRow) -> Ratio | None:
    """How many times as fast as transformers' expert parallelism."""
    best = case.best_peer()
    return None if best is None or row is best else _ratio(case, row, best)


def to_one(case: BenchCase, row: RankRow, threads: int) -> Ratio | None:
    """How many times as fast as the same executor in one process; of a peer, as the first executor."""
    ours = [one.function for one in rank_rows(case) if one.ours]
    function = row.function if row.ours else ours[0] if ours else ""
    name = f"{function} {one_process(threads)}"
    other = next((one for one in rank_rows(case) if one.name == name), None)
    return None if other is None or other is row else _ratio(case, row, other)


def _ratio(case: BenchCase, row: RankRow, other: Any) -> Ratio | None:
    if not row.seconds or not other.seconds:
        return None
    ratio, control = spread(ratios(other.seconds, row.seconds)), case.control()
    return ratio, control is not None and is_no_result(ratio, control)


def as_json(settings: Settings, ranks: int, cases: list[BenchCase], seconds: float, complete: bool) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "schema": SCHEMA,
        "machine": report.machine(),
        "ranks": ranks,
        "backend": "gloo",
        "transformers": peers_version(),
        "quantisation": settings.quantisation.as_json() if settings.quantisation else None,
        "commit": commit(),
        "arguments": asdict(settings),
        "seconds": seconds,
        "complete": complete,
        "cases": [_case(case, ranks) for case in cases],
    }


def _case(case: BenchCase, ranks: int) -> dict[str, Any]:
    best = case.best_peer()
    return {
        **case.shape.as_json(),
        "T": case.tokens,
        "routing": case.routing,
        "direction": case.direction,
        "load": asdict(case.load) | {"active": case.active},
        "form": asdict(case.storage),
        "best_peer": best.name if best else None,
        "control": control_json(case),
        "contenders": [_contender(case, row, ranks) for row in rank_rows(case)],
    }


def _contender(case: BenchCase, row: RankRow, ranks: int) -> dict[str, Any]:
    return {
        **row_json(row),
        "name": row.function,
        "how": row.how,
        "ranks": ranks if row.spread else 1,
        "time": asdict(spread(row.seconds)) if row.seconds else None,
        "times_peer": _as_json(to_peer(case, row)),
        "times_one_process": {str(n): _as_json(to_one(case, row, n)) for n in thread_counts(ranks)},
    }


def _as_json(found: Ratio | None) -> dict[str, Any] | None:
    return asdict(found[0]) | {"no_result": found[1]} if found else None
