"""The command that judges and times every executor on one layer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from executors._cli import options as cli
from executors._compare import report
from executors._compare import run as comparison
from executors._compare.judge import exact_answer
from executors._files.whole import write_json


@dataclass(frozen=True)
class CompareOptions:
    """What can be asked of a comparison."""

    file: cli.FileArgument = None
    executor: Annotated[
        list[str] | None,
        typer.Option("--executor", metavar="NAME", help="Only this one; repeatable. Default: all but auto."),
    ] = None
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.png.")] = Path("compare-results")
    device: cli.DeviceOption = "cpu"
    tokens: cli.TokensOption = None
    repeats: cli.RepeatsOption = 10
    seed: cli.SamplesSeedOption = 0


@cli.with_options(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Judges and times every executor on a layer.

    Each runs forward and backward. Every output and gradient is judged in error bars. Prints one table, and writes
    compare.json and compare.png into --out, in place of those that are there. "auto" is left out: it is one of the
    others. It takes a minute or two on 2 cores. Exit status: 0 if all that ran passed, 1 if one failed or an executor
    asked for by name cannot run, 2 for bad arguments.

    Example: python -m executors compare layer.safetensors --executor native --executor grouped_mm
    """
    names = cli.chosen_names(options.executor)
    cli.make_folder(options.out)
    layer, left_out = cli.load_clear(options.file, options.device, options.tokens)
    started, seed, tokens, repeats = time.monotonic(), options.seed, options.tokens, options.repeats
    with cli.progress_bar() as show:
        truth = exact_answer(layer, seed, lambda done, total: show("sampling error bars", done, total))
        rows = comparison.compare(layer, truth, names, repeats, seed, tokens, lambda text: show(text, 0, 0))
    heading = report.heading(layer, truth, comparison.display(layer.path))
    _print(heading, rows, left_out)
    arguments = {"device": options.device, "tokens": tokens, "repeats": repeats, "seed": seed}
    write_json(options.out / "compare.json", report.as_json(layer, truth, rows, arguments))
    _plot(options.out / "compare.png", rows, heading)
    cli.print_written(options.out, ["compare.json", "compare.png"], started)
    if any(row.failed or (row.reason and options.executor) for row in rows):
        raise typer.Exit(1)


def _print(heading: str, rows: list[comparison.CompareRow], left_out: int) -> None:
    console = cli.new_console()
    console.print(escape(heading))
    console.print(report.table(rows))
    if left_out:
        console.print(f"{left_out} tokens left out: more than one choice of experts is right for them (R2)")
    for line in report.below(rows):
        console.print(escape(line))


def _plot(path: Path, rows: list[comparison.CompareRow], heading: str) -> None:
    from executors._compare.plot import plot  # matplotlib takes a second to import: only where it is needed

    plot(path, rows, heading)
