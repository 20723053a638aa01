"""The commands and their help."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import executors
from executors._cli import compare as comparison
from executors._cli import report
from executors._cli.judge import exact_answer, with_clear_choice
from executors._cli.layer_file import BadLayerFile, Layer, bundled_layer, first_tokens, load_layer

if TYPE_CHECKING:
    from executors._cli.bench import Case

SHOW_AFTER_S = 2.0
WIDTH = 80
LARGEST_SEED = 2**63 - 1

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
DeviceOption = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]


@app.command("list")
def list_executors() -> None:
    """Lists all executors: usable here or why not.

    Says where each of them comes from: built in, registered, or from an installed package.
    """
    _print_rows(executors.explain())


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
        _console().print(f"auto: {escape(str(error))}")
    else:
        _console().print(f"auto chooses {chosen}: {escape(why)}")


@app.command()
def compare(
    file: FileArgument = None,
    executor: Annotated[
        list[str] | None,
        typer.Option("--executor", metavar="NAME", help="Only this one; repeatable. Default: all but auto."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.png.")] = Path("compare-results"),
    device: DeviceOption = "cpu",
    tokens: Annotated[int | None, typer.Option(min=1, help="Only the layer's first N tokens.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each executor.")] = 10,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the upstream gradient and of the samples.")
    ] = 0,
) -> None:
    """Judges and times every executor on a layer.

    Runs each forward and backward, judges every output and gradient in error bars, prints one table, and writes
    compare.json and compare.png. "auto" is left out: it is one of the others. Exit status: 0 if all that ran passed, 1
    if one failed or an executor asked for by name cannot run, 2 for bad arguments.
    """
    names = _names(executor)
    _make_folder(out)
    given = first_tokens(_load(file, device), tokens)
    layer = with_clear_choice(given)
    left_out = len(given.x) - len(layer.x)
    if not len(layer.x):
        _refuse("router_logits: must have a token for which only one choice of experts is right")
    started = time.monotonic()
    with _progress() as show:
        truth = exact_answer(layer, seed, lambda done, total: show("sampling error bars", done, total))
        rows = comparison.compare(layer, truth, names, repeats, seed, tokens, lambda text: show(text, 0, 0))
    console = _console()
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


@app.command()
def bench(
    layer: Annotated[
        list[str] | None, typer.Option("--layer", metavar="NAME", help="A model's layer; repeatable.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="T; repeatable. Default: 1, 8, 64, 512.")] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(help="real, uniform or skewed; repeatable. Default: all forward, real with backward."),
    ] = None,
    direction: Annotated[
        list[str] | None, typer.Option(help="forward or forward_backward; repeatable. Default: both.")
    ] = None,
    executor: Annotated[
        list[str] | None,
        typer.Option("--executor", metavar="NAME", help="Only this one of ours; repeatable. Default: all but auto."),
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Divides H and I, for a quick look.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each case is timed; 7 rounds at least.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench-results"),
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights, inputs and samples.")] = 0,
) -> None:
    """Times every executor, and transformers' experts functions, on layers of real models.

    All contenders get the same random bf16 weights and the same tokens, are judged in error bars first, and are timed
    in turn, round by round. Prints a table for each layer, routing and direction, and writes bench.json and bench.png.
    Exit status: 0 if all executors passed, 1 if one failed or an executor asked for by name cannot run, 2 for bad
    arguments. The peers need transformers: pip install "moe-ref[bench]".
    """
    from executors._cli import bench as benchmark
    from executors._cli import bench_report

    _check_device(device)
    settings = benchmark.Settings(
        names=tuple(_names(executor)),
        layers=tuple(_choice("--layer", layer, benchmark.known_layers()) or benchmark.DEFAULT_LAYERS),
        tokens=tuple(dict.fromkeys(tokens)) if tokens else benchmark.default_tokens(device),
        routings=_choice("--routing", routing, benchmark.known_routings()),
        directions=_choice("--direction", direction, benchmark.DIRECTIONS) or benchmark.DIRECTIONS,
        scale=scale,
        seconds=seconds,
        device=device,
        seed=seed,
        load=os.getloadavg()[0],
    )
    _make_folder(out)
    started = time.monotonic()
    with _progress() as show:
        ceilings, cases = benchmark.run(settings, show)
    console = _console()
    heading = bench_report.heading(settings, ceilings)
    console.print(escape("\n".join(heading)))
    for title, table in bench_report.tables(cases, ceilings):
        console.print(escape(f"\n{title}"))
        console.print(table)
    for line in bench_report.notes(cases):
        console.print(escape(line))
    taken = time.monotonic() - started
    report.write_json(out / "bench.json", bench_report.as_json(settings, ceilings, cases, taken))
    _plot_bench(out / "bench.png", cases, heading[0])
    console.print(escape(f"wrote {out / 'bench.json'} and {out / 'bench.png'} ({taken:.0f} s)"))
    rows = [row for case in cases for row in case.rows if row.ours]
    if any(row.failed for row in rows) or (executor and any(row.reason for row in rows)):
        raise typer.Exit(1)


def _plot(path: Path, rows: list[comparison.Row], heading: str) -> None:
    from executors._cli.plot import plot  # matplotlib takes a second to import: only where it is needed

    plot(path, rows, heading)


def _plot_bench(path: Path, cases: list[Case], title: str) -> None:
    from executors._cli.bench_plot import plot

    plot(path, cases, title)


def _make_folder(out: Path) -> None:
    """Before the work, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _refuse(f"--out {out}: must be a folder that can be written: {error.strerror}")


def _names(chosen: list[str] | None) -> list[str]:
    known = comparison.everyone()
    for name in chosen or []:
        if name not in known:
            _refuse(f"--executor {name}: must be one of {', '.join(known)}")
    return list(dict.fromkeys(chosen)) if chosen else known


def _choice(option: str, chosen: list[str] | None, known: Sequence[str]) -> tuple[str, ...] | None:
    for name in chosen or []:
        if name not in known:
            _refuse(f"{option} {name}: must be one of {', '.join(known)}")
    return tuple(dict.fromkeys(chosen)) if chosen else None


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        _refuse(f"--device {device}: must be a device that torch has here: {str(error).splitlines()[0]}")


def _load(file: Path | None, device: str) -> Layer:
    _check_device(device)
    try:
        return load_layer(file or bundled_layer(), device)
    except BadLayerFile as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _console() -> Console:
    return Console(width=WIDTH, soft_wrap=False, highlight=False)


def _print_rows(rows: list[executors.Explanation]) -> None:
    out = Table(width=WIDTH)
    out.add_column("executor", no_wrap=True)
    out.add_column("usable", no_wrap=True)
    out.add_column("from", no_wrap=True)
    out.add_column("why not, or a remark", ratio=1)
    for row in rows:
        usable = "[green]yes[/green]" if row.usable else "[red]no[/red]"
        out.add_row(row.name, usable, escape(row.source), escape(row.reason or row.note))
    _console().print(out)


@contextmanager
def _progress() -> Iterator:  # type: ignore[type-arg]
    """A progress bar on stderr, shown only on a terminal, and only once the work has taken two seconds."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("", total=None)
    started = time.monotonic()

    def show(text: str, done: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - started > SHOW_AFTER_S and bar.console.is_terminal:
            bar.start()
        bar.update(task, description=text, completed=done, total=total or None)

    try:
        yield show
    finally:
        bar.stop()
