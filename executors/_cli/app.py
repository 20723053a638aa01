"""The commands and their help."""

from __future__ import annotations

from typing import Annotated

import torch
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
from executors._compare.report import version_of
from executors._decode.bitsandbytes import silence_news

app = typer.Typer(
    help="Executors of Mixture-of-Experts layers: which are usable here, and which may be trusted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moe-ref {version_of('moe-ref') or 'not installed'}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _before_commands(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say the version, and end.")
    ] = False,
) -> None:
    silence_news()


@app.command("list")
def list_executors() -> None:
    """Lists all executors: usable here or why not.

    Says where each of them comes from (built in, registered, or from an installed package), and what weights it takes.
    """
    print_rows(executors.explain(), kinds=True)


for command in (explain, compare, extract, bench, crossover, kernels, plan, tune, report):
    app.command()(command)
