"""The benchmark's tables for people, and its JSON for programs."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from executors._cli import report
from executors._cli.bench import WITH_BACKWARD, Case, Row, Settings
from executors._cli.bench_measure import Ceilings, Spread, is_no_result, spread
from executors._cli.bench_peers import PREFIX, peers_version

SCHEMA = 1
SHORTEST, LONGEST = 9, 15  # of a contender's name on one line, so that a table fits in 80 columns
MILLISECONDS = 1000.0
BUSY = 0.5  # processes that were running or waiting, over the last minute, from which the reader is warned


def heading(settings: Settings, ceilings: Ceilings) -> list[str]:
    """What holds for all tables."""
    machine = report.machine()
    where = machine["gpu"] if settings.device.startswith("cuda") else machine["processor"]
    version = peers_version()
    peers = f"{PREFIX} is transformers {version}" if version else "transformers is not installed: no peers"
    busy = (
        [f"other work ran here before (load {settings.load:.1f}): do not trust the times"]
        if settings.load > BUSY
        else []
    )
    return [
        f"{where}, {machine['threads']} threads, torch {machine['torch']}; {peers}",
        f"ceilings: bf16 product {ceilings.tflops:.2f} TFLOP/s, copy {ceilings.copy_gbs:.0f} GB/s, "
        f"read {ceilings.read_gbs:.0f} GB/s",
        "+-: half of what lies between the 10th and 90th percentile of the times",
        "x best: how many times as fast as the fastest of transformers; median, 10th and",
        "90th percentile over the rounds. ~: no result, a contender differs as much from",
        "itself: it is timed twice in each round, see 'again'",
        *busy,
    ]


def tables(cases: list[Case], ceilings: Ceilings) -> list[tuple[str, Table]]:
    """A title and a table for each layer, routing and direction."""

    def key(case: Case) -> tuple[str, str, str]:
        return case.shape.name, case.routing, case.direction

    grouped = (list(group) for _, group in groupby(cases, key))
    return [(title(group), table(group, ceilings)) for group in grouped]


def title(cases: list[Case]) -> str:
    """Two lines on the layer and on the load."""
    shape, first = cases[0].shape, cases[0]
    cut = f" (H and I cut by {shape.cut})" if shape.cut > 1 else ""
    direction = "forward + backward" if first.direction == WITH_BACKWARD else "forward"
    loads = ", ".join(f"{c.load.max_over_mean:.1f}" for c in cases)
    return (
        f"{shape.name}{cut}: E={shape.experts}, K={shape.top_k}, H={shape.hidden}, I={shape.intermediate}, bfloat16\n"
        f"{direction}, {first.routing} routing; busiest expert / mean: {loads}"
    )


def table(cases: list[Case], ceilings: Ceilings) -> Table:
    """A row for each T and contender, in 80 columns; who did not run stands with the reason."""
    out = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    out.add_column("T", justify="right", no_wrap=True)
    longest = max(len(row.name) for case in cases for row in case.rows)
    out.add_column("contender", overflow="fold", width=max(SHORTEST, min(longest, LONGEST)))
    for name in ("max z", "ms", "+-", "x best", "10-90%", "TFLOP/s", "GB/s"):
        out.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        for number, row in enumerate(case.rows):
            out.add_row(str(case.tokens) if number == 0 else "", *_cells(case, row, ceilings))
            control = case.control()
            if row.name == case.reference and control is not None:
                cells = ["", "  again", "", *_times(spread(case.again)), f"{control.median:.2f}", _range(control)]
                out.add_row(*(f"[dim]{cell}[/dim]" for cell in cells), "", "")
        out.add_section()
    return out


def notes(cases: list[Case]) -> list[str]:
    """Why contenders did not run, and what failed, each once."""
    lines = []
    for case in cases:
        for row in case.rows:
            direction = "with backward" if case.direction == WITH_BACKWARD else "forward"
            where = f"T={case.tokens} {direction}"
            if row.reason:
                lines.append(f"{row.name} not run ({case.shape.name}, {where}): {row.reason}")
            elif row.failed and row.judgement is not None:
                failure = row.judgement.failure
                lines.append(f"{row.name} FAILED ({case.shape.name}, {where}, {case.routing}): {failure}")
    return list(dict.fromkeys(lines))


def as_json(settings: Settings, ceilings: Ceilings, cases: list[Case], seconds: float) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "schema": SCHEMA,
        "machine": report.machine(),
        "transformers": peers_version(),
        "commit": commit(),
        "arguments": asdict(settings),
        "ceilings": asdict(ceilings),
        "seconds": seconds,
        "cases": [_case(case, ceilings) for case in cases],
    }


def commit() -> str | None:
    """The git commit of this package, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "app.py") is None:
        return None  # a checkout around us, but of something else
    head = git("rev-parse", "HEAD")
    return head + "+" if head and git("status", "--porcelain", "--untracked-files=no") else head


def _case(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    best, control, shape = case.best_peer(), case.control(), case.shape
    return {
        "layer": shape.name,
        "E": shape.experts,
        "K": shape.top_k,
        "H": shape.hidden,
        "I": shape.intermediate,
        "cut": shape.cut,
        "T": case.tokens,
        "routing": case.routing,
        "direction": case.direction,
        "load": asdict(case.load) | {"active": case.active},
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "best_peer": best.name if best else None,
        "control": None
        if control is None
        else {"contender": case.reference, "seconds": case.again, "ratio": asdict(control)},
        "contenders": [_contender(case, row, ceilings) for row in case.rows],
    }


def _contender(case: Case, row: Row, ceilings: Ceilings) -> dict[str, Any]:
    judgement, ratio, control = row.judgement, case.ratio(row), case.control()
    found: dict[str, Any] = {
        "name": row.name,
        "ours": row.ours,
        "reason": row.reason,
        "passed": judgement is not None and not judgement.failure,
        "failure": judgement.failure if judgement else "",
        "max_z": {v.name: v.max_z for v in judgement.verdicts} if judgement else {},
        "seconds": row.seconds,
    }
    if row.seconds:
        time = spread(row.seconds)
        tflops, gbs = _rates(case, time)
        found |= {
            "time": asdict(time),
            "times_best": asdict(ratio) if ratio else None,
            "no_result": is_no_result(ratio, control) if ratio and control else None,
            "tflops": tflops,
            "gbs": gbs,
            "of_product": tflops / ceilings.tflops,
            "of_bandwidth": gbs / ceilings.gbs,
        }
    return found


def _rates(case: Case, time: Spread) -> tuple[float, float]:
    """TFLOP/s and GB/s at the median."""
    return case.flops / time.median / 1e12, case.bytes_moved / time.median / 1e9


def _cells(case: Case, row: Row, ceilings: Ceilings) -> list[str]:
    name = escape(row.name)
    if row.reason:
        return [f"[dim]{name}[/dim]", "", "[dim]not run[/dim]", *[""] * 5]
    assert row.judgement is not None
    z = row.judgement.max_z
    shown = "" if z is None else f"{min(z, 9999.0):.1f}"
    if row.failed:
        return [name, f"[red]{shown}[/red]", "[red]FAIL[/red]", *[""] * 5]
    time, ratio, control = spread(row.seconds), case.ratio(row), case.control()
    tflops, gbs = _rates(case, time)
    cells = [name, shown, *_times(time)]
    if ratio is None:
        cells += ["", ""]
    elif row is case.best_peer():
        cells += ["best", ""]
    else:
        unsure = control is not None and is_no_result(ratio, control)
        cells += [f"{'~' if unsure else ''}{ratio.median:.2f}", _range(ratio)]
    return [
        *cells,
        f"{_short(tflops)} {tflops / ceilings.tflops:4.0%}",
        f"{gbs:.{0 if gbs >= 10 else 1}f} {gbs / ceilings.gbs:4.0%}",
    ]


def _times(time: Spread) -> list[str]:
    return [_short(MILLISECONDS * time.median), f"{min((time.high - time.low) / 2 / time.median, 9.99):.0%}"]


def _range(ratio: Spread) -> str:
    return "-".join(f"{r:.{2 if r < 10 else 0}f}" for r in (ratio.low, ratio.high))


def _short(value: float) -> str:
    """Three significant digits without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"
