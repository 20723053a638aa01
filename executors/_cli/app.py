"""The commands and their help."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import executors
from executors._cli.bench import bench
from executors._cli.crossover import crossover
from executors._cli.extract import extract_layer
from executors._cli.kernels import kernels
from executors._cli.options import (
    LARGEST_SEED,
    WIDTH,
    DeviceOption,
    check_device,
    chosen_names,
    make_folder,
    new_console,
    progress_bar,
    refuse,
    within,
)
from executors._cli.tune import tune
from executors._compare import report
from executors._compare import run as comparison
from executors._compare.judge import exact_answer, with_clear_choice
from executors.layer_file import BadLayerFile, Layer, bundled_layer, first_tokens, load_layer

app = typer.Typer(
    help="Executors of Mixture-of-Experts layers: which are usable here, and which may be trusted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="A layer file (docs/layer-file.md); default: the bundled layer."),
]


@app.command("list")
def list_executors() -> None:
    """Lists all executors: usable here or why not.

    Says where each of them comes from (built in, registered, or from an installed package), and what weights it takes.
    """
    _print_rows(executors.explain(), kinds=True)


@app.command()
def explain(file: FileArgument = None, device: DeviceOption = "cpu") -> None:
    """Says which executors can take a layer.

    One row for each executor, with the reason why not; then what "auto" would choose, and why.
    """
    layer = _load(file, device)
    _print_rows(executors.explain(layer.x, layer.weights))
    try:
        auto = executors.get("auto")
        chosen, why = auto.choose(layer.x, layer.weights)  # type: ignore[attr-defined]
    except (executors.Unavailable, executors.Unsupported) as error:
        new_console().print(f"auto: {escape(str(error))}")
    else:
        new_console().print(f"auto chooses {chosen}: {escape(why)}")


@app.command()
def compare(
    file: FileArgument = None,
    executor: Annotated[
        list[str] | None,
        typer.Option("--executor", metavar="NAME", help="Only this one; repeatable. Default: all but auto."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.png.")] = Path("compare-results"),
    device: DeviceOption = "cpu",
    tokens: Annotated[int | None, typer.Option(callback=within(1), help="Only the layer's first N tokens.")] = None,
    repeats: Annotated[int, typer.Option(callback=within(1), help="Timed calls of each executor.")] = 10,
    seed: Annotated[
        int, typer.Option(callback=within(0, LARGEST_SEED), help="Seed of the upstream gradient and of the samples.")
    ] = 0,
) -> None:
    """Judges and times every executor on a layer.

    Runs each forward and backward, judges every output and gradient in error bars, prints one table, and writes
    compare.json and compare.png. "auto" is left out: it is one of the others. Exit status: 0 if all that ran passed, 1
    if one failed or an executor asked for by name cannot run, 2 for bad arguments.
    """
    names = chosen_names(executor)
    make_folder(out)
    given = first_tokens(_load(file, device), tokens)
    layer = with_clear_choice(given)
    left_out = len(given.x) - len(layer.x)
    if not len(layer.x):
        refuse("router_logits: must have a token for which only one choice of experts is right")
    started = time.monotonic()
    with progress_bar() as show:
        truth = exact_answer(layer, seed, lambda done, total: show("sampling error bars", done, total))
        rows = comparison.compare(layer, truth, names, repeats, seed, tokens, lambda text: show(text, 0, 0))
    console = new_console()
    heading = report.heading(layer, truth, comparison.display(layer.path))
    console.print(escape(heading))
    console.print(report.table(rows))
    if left_out:
        console.print(f"{left_out} tokens left out: more than one choice of experts is right for them (R2)")
    for line in report.failures(rows):
        console.print(escape(line))
    arguments = {"device": device, "tokens": tokens, "repeats": repeats, "seed": seed}
    report.write_json(out / "compare.json", report.as_json(layer, truth, rows, arguments))
    _plot(out / "compare.png", rows, heading)
    seconds = time.monotonic() - started
    console.print(escape(f"wrote {out / 'compare.json'} and {out / 'compare.png'} ({seconds:.0f} s)"))
    not_run = [row for row in rows if row.reason and executor]
    if any(row.failed for row in rows) or not_run:
        raise typer.Exit(1)


app.command()(bench)
app.command()(crossover)
app.command("extract")(extract_layer)
app.command()(kernels)
app.command()(tune)


def _plot(path: Path, rows: list[comparison.Row], heading: str) -> None:
    from executors._compare.plot import plot  # matplotlib takes a second to import: only where it is needed

    plot(path, rows, heading)


def _load(file: Path | None, device: str) -> Layer:
    check_device(device)
    try:
        return load_layer(file or bundled_layer(), device)
    except BadLayerFile as error:
        refuse(str(error))


def _print_rows(rows: list[executors.Explanation], *, kinds: bool = False) -> None:
    """A table; with ``kinds`` what projections each of them takes."""
    out = Table(width=WIDTH)
    out.add_column("executor", no_wrap=True)
    out.add_column("usable", no_wrap=True)
    out.add_column("from", no_wrap=True)
    if kinds:
        out.add_column("weights", max_width=11)
    out.add_column("why not, or a remark", ratio=1)
    for row in rows:
        usable = "[green]yes[/green]" if row.usable else "[red]no[/red]"
        weights = [", ".join(row.weights)] if kinds else []
        out.add_row(row.name, usable, escape(row.source), *weights, escape(row.reason or row.note))
    new_console().print(out)
