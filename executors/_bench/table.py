"""The benchmark's tables for people, in 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from rich import box
from rich.markup import escape
from rich.table import Table

from executors._bench.case import FORWARD, LORA, WITH_BACKWARD, BenchCase, BenchRow
from executors._bench.ceilings import Ceilings
from executors._bench.measure import Spread, is_no_result, spread

SHORTEST, LONGEST = 9, 15  # of a contender's name on one line, so that a table fits in 80 columns
LONGEST_IN_4_BITS = 20
MILLISECONDS = 1000.0
MIB = 2**20
DIRECTIONS = {FORWARD: "forward", WITH_BACKWARD: "forward + backward", LORA: "forward + backward with adapters"}

Column = tuple[str, Callable[[BenchCase, BenchRow], str]]


def tables(cases: list[BenchCase], ceilings: Ceilings) -> list[tuple[str, Table]]:
    """A title and a table for each layer, routing and direction."""

    def key(case: BenchCase) -> tuple[str, str, str]:
        return case.shape.name, case.routing, case.direction

    grouped = (list(group) for _, group in groupby(cases, key))
    return [(title(group), table(group, ceilings)) for group in grouped]


def title(cases: list[BenchCase]) -> str:
    """Two lines on the layer and on the load, or three."""
    first = cases[0]
    frozen = ", base frozen" if first.backward and first.storage.frozen else ""
    rank = f" of rank {first.storage.rank}" if first.storage.rank else ""
    loads = ", ".join(f"{c.load.max_over_mean:.1f}" for c in cases)
    end = "\n" if first.stack else "; "
    return (
        f"{first.shape}, bfloat16\n"
        f"{DIRECTIONS[first.direction]}{rank}{frozen}, {first.routing} routing{end}busiest expert / mean: {loads}"
    )


def table(cases: list[BenchCase], ceilings: Ceilings) -> Table:
    """A row for each T and contender."""
    columns = _columns(cases, ceilings)
    out = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    out.add_column("T", justify="right", no_wrap=True)
    longest = max(len(row.name) for case in cases for row in case.rows)
    limit = LONGEST_IN_4_BITS if cases[0].stack else LONGEST
    out.add_column("contender", overflow="fold", width=max(SHORTEST, min(longest, limit)))
    for name, _ in columns:
        out.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        for number, row in enumerate(case.rows):
            out.add_row(str(case.tokens) if number == 0 else "", *_cells(case, row, columns))
            again = _again(case) if row.name == case.reference else {}
            if again:
                _add_dim(out, "  again", again, columns)
            if row.graph:
                _add_dim(out, "  in a graph", _in_a_graph(case, row, ceilings), columns)
        if any(name == "MiB" for name, _ in columns) and case.stack:
            for what, size in zip(("active", "all"), case.decoded(), strict=True):
                _add_dim(out, f"  {what} decoded", {"MiB": short(size / MIB)}, columns)
        out.add_section()
    return out


def _columns(cases: list[BenchCase], ceilings: Ceilings) -> list[Column]:
    """The columns of a table: name, and text of a row."""
    rows = [row for case in cases for row in case.rows]
    columns: list[Column] = [
        ("max z", lambda case, row: max_z(row)),
        ("ms", lambda case, row: short(MILLISECONDS * spread(row.seconds).median)),
        ("+-", lambda case, row: relative(spread(row.seconds))),
    ]
    best: Column = ("x best", lambda case, row: _ratio(case, case.ratio(row), row is case.best_peer(), "best"))
    memory: list[Column] = [("MiB", lambda case, row: "?" if row.peak is None else short(row.peak / MIB))]
    tflops: Column = ("TFLOP/s", lambda case, row: _tflops(case, spread(row.seconds), ceilings))
    gbs: Column = ("GB/s", lambda case, row: _gbs(case, spread(row.seconds), ceilings))
    if not any(row.peak is not None or row.no_peak for row in rows):
        memory = []
    if cases[0].gpu and not cases[0].stack:
        launches: Column = ("n", lambda case, row: "?" if row.launches is None else str(row.launches))
        return [*columns, best, tflops, gbs, launches, *memory]
    stack: Column = ("x stack", lambda case, row: _ratio(case, case.stack_ratio(row), row is case.stack_row(), "stack"))
    if any(case.dense_row() for case in cases):
        dense: Column = (
            "x bf16",
            lambda case, row: _ratio(case, case.dense_ratio(row), row is case.dense_row(), "bf16"),
        )
        columns += [best, *([stack] if any(case.stack_row() for case in cases) else []), dense]
    elif any(case.stack_row() for case in cases):
        of_stack: Column = (
            "10-90%",
            lambda case, row: "" if row is case.stack_row() else _range(case.stack_ratio(row)),
        )
        columns += [best, stack, of_stack]
    else:
        columns += [best, ("10-90%", lambda case, row: "" if row is case.best_peer() else _range(case.ratio(row)))]
    if memory or any(case.stack for case in cases):
        return [*columns, *memory, ("roof", lambda case, row: _roof(case, row, ceilings))]
    return [*columns, tflops, gbs]


def _cells(case: BenchCase, row: BenchRow, columns: list[Column]) -> list[str]:
    name = escape(row.name)
    if row.reason:
        return [f"[dim]{name}[/dim]", *_only({"ms": "[dim]not run[/dim]"}, columns)]
    if row.failed:
        return [name, *_only({"max z": f"[red]{max_z(row)}[/red]", "ms": "[red]FAIL[/red]"}, columns)]
    if row.untimed:
        return [name, *_only({"max z": max_z(row), "ms": "[dim]slow[/dim]"}, columns)]
    if row.interpreted:
        time = escape(f"[{short(MILLISECONDS * spread(row.seconds).median)}]")
        return [name, *_only({"max z": max_z(row), "ms": time}, columns)]
    return [name, *(cell(case, row) for _, cell in columns)]


def _again(case: BenchCase) -> dict[str, str]:
    """The second times of the reference."""
    control = case.control()
    if control is None:
        return {}
    time = spread(case.again)
    return {
        "ms": short(MILLISECONDS * time.median),
        "+-": relative(time),
        "x best": f"{control.median:.2f}",
        "10-90%": _range(control),
    }


def _in_a_graph(case: BenchCase, row: BenchRow, ceilings: Ceilings) -> dict[str, str]:
    """The times of a call captured in a CUDA graph."""
    time, ratio, of_dense = spread(row.graph), case.graph_ratio(row), case.dense_graph_ratio(row)
    return {
        "ms": short(MILLISECONDS * time.median),
        "+-": relative(time),
        "x best": f"{ratio.median:.2f}" if ratio else "",
        "x bf16": f"{of_dense.median:.2f}" if of_dense else "",
        "TFLOP/s": _tflops(case, time, ceilings),
        "GB/s": _gbs(case, time, ceilings),
    }


def _add_dim(out: Table, name: str, cells: dict[str, str], columns: list[Column]) -> None:
    out.add_row(*(f"[dim]{cell}[/dim]" if cell else "" for cell in ("", name, *_only(cells, columns))))


def _only(cells: dict[str, str], columns: list[Column]) -> list[str]:
    return [cells.get(name, "") for name, _ in columns]


def rates(case: BenchCase, time: Spread) -> tuple[float, float]:
    """TFLOP/s and GB/s at the median."""
    return case.flops / time.median / 1e12, case.bytes_moved / time.median / 1e9


def max_z(row: BenchRow) -> str:
    """The largest z of a row that ran."""
    z = row.judgement.max_z if row.judgement else None
    return "" if z is None else f"{min(z, 9999.0):.1f}"


def _ratio(case: BenchCase, ratio: Spread | None, itself: bool, name: str) -> str:
    if ratio is None:
        return ""
    if itself:
        return name
    control = case.control()
    unsure = control is not None and is_no_result(ratio, control)
    digits = 2 if ratio.median < 10 else 1
    return f"{'~' if unsure else ''}{ratio.median:.{digits}f}"


def _tflops(case: BenchCase, time: Spread, ceilings: Ceilings) -> str:
    tflops, _ = rates(case, time)
    return f"{short(tflops)} {tflops / ceilings.tflops:4.0%}"


def _gbs(case: BenchCase, time: Spread, ceilings: Ceilings) -> str:
    _, gbs = rates(case, time)
    ceiling = ceilings.copy_gbs if case.gpu else ceilings.gbs
    return f"{gbs:.{0 if gbs >= 10 else 1}f} {gbs / ceiling:4.0%}"


def _roof(case: BenchCase, row: BenchRow, ceilings: Ceilings) -> str:
    """The larger share of the two ceilings."""
    tflops, gbs = rates(case, spread(row.seconds))
    share, what = max((tflops / ceilings.tflops, "P"), (gbs / ceilings.gbs, "R"))
    return f"{share:.0%} {what}" if share >= 0.01 else f"{share:.1%} {what}"


def relative(time: Spread) -> str:
    """Half of what lies between the 10th and 90th percentile, over the median."""
    return f"{min((time.high - time.low) / 2 / time.median, 9.99):.0%}"


def _range(ratio: Spread | None) -> str:
    return "" if ratio is None else "-".join(f"{r:.{2 if r < 10 else 0}f}" for r in (ratio.low, ratio.high))


def short(value: float) -> str:
    """Three significant digits without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"
