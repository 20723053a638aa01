"""The commands and their help."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

import executors
from executors._cli import options as cli
from executors._cli.bench import bench
from executors._cli.compare import compare
from executors._cli.crossover import crossover
from executors._cli.kernels import kernels
from executors._cli.tune import tune

app = typer.Typer(
    help="Executors of Mixture-of-Experts layers: which are usable here, and which may be trusted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command("list")
def list_executors() -> None:
    """Lists all executors: usable here or why not.

    Says where each of them comes from (built in, registered, or from an installed package), and what weights it takes.
    """
    _print_rows(executors.explain(), kinds=True)


@app.command()
def explain(file: cli.FileArgument = None, device: cli.DeviceOption = "cpu") -> None:
    """Says which executors can take a layer.

    One row for each executor, with the reason why not; then what "auto" would choose, and why.
    """
    layer = cli.load(file, device)
    _print_rows(executors.explain(layer.x, layer.weights))
    try:
        auto = executors.get("auto")
        chosen, why = auto.choose(layer.x, layer.weights)  # type: ignore[attr-defined]
    except (executors.Unavailable, executors.Unsupported) as error:
        cli.new_console().print(f"auto: {escape(str(error))}")
    else:
        cli.new_console().print(f"auto chooses {chosen}: {escape(why)}")


for command in (compare, bench, crossover, kernels, tune):
    app.command()(command)


def _print_rows(rows: list[executors.Explanation], *, kinds: bool = False) -> None:
    """Prints a table; with ``kinds`` it has the weights that each executor takes."""
    out = Table(width=cli.WIDTH)
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
    cli.new_console().print(out)
