"""``bench --ranks``: expert parallelism on processes of this machine."""

from __future__ import annotations

import time
from pathlib import Path

from rich.markup import escape

from executors._bench import report
from executors._bench.case import BenchCase
from executors._bench.ranks import run as benchmark
from executors._bench.ranks import table
from executors._bench.ranks.processes import RankFailed
from executors._bench.settings import Settings
from executors._cli import options as cli
from executors._files.whole import write_json


def bench_ranks(settings: Settings, ranks: int, out: Path) -> list[BenchCase]:
    """Measures, prints tables, and writes bench-ranks.json and bench-ranks.png; returns all cases.

    Raises:
        RankFailed: a rank raised or ended; what was measured before is kept.
    """
    cli.make_folder(out)
    started = time.monotonic()
    cases: list[BenchCase] = []
    total = settings.cases()

    def write(complete: bool = False) -> None:
        found = table.as_json(settings, ranks, cases, time.monotonic() - started, complete)
        write_json(out / "bench-ranks.json", found)

    with cli.progress_bar() as show:

        def keep(case: BenchCase) -> None:
            cases.append(case)
            write()

        try:
            benchmark.run(settings, ranks, lambda text: show(text, len(cases), total), keep)
        except RankFailed as error:
            cli.fail(str(error))
    write(complete=True)
    console = cli.new_console()
    console.print(escape("\n".join(table.heading(settings, ranks))))
    for title, found in table.tables(cases, ranks):
        console.print(escape(f"\n{title}"))
        console.print(found)
    for line in report.notes(cases):
        console.print(escape(line))
    cli.print_written(out, ["bench-ranks.json", _plot(out, cases, settings, ranks)], started)
    return cases


def _plot(out: Path, cases: list[BenchCase], settings: Settings, ranks: int) -> str:
    """Writes the picture, and returns its name."""
    from executors._bench.ranks import plot  # matplotlib takes a second to import

    title = "\n".join(table.heading(settings, ranks)[:2])
    plot.plot(out / "bench-ranks.png", cases, title)
    return "bench-ranks.png"
