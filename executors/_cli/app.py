"""The commands and their help."""

from __future__ import annotations

import typer

import executors
from executors._cli.bench import bench
from executors._cli.compare import compare
from executors._cli.crossover import crossover
from executors._cli.explain import explain, print_rows
from executors._cli.extract import extract
from executors._cli.kernels import kernels
from executors._cli.plan import plan
from executors._cli.report import report
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
    print_rows(executors.explain(), kinds=True)


for command in (explain, compare, extract, bench, crossover, kernels, plan, tune, report):
    app.command()(command)
