"""``explain``: which executors take a layer, or the layers of a model."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import executors
from executors._cli import options as cli

LONGEST_NAME = 34  # "transformers_nemotron_h_grouped_mm"; a longer one is folded
PACKAGE = "from distribution "

ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS_OR_DIR",
        help="Instead of a file: a model class of transformers, or a folder with a config.json. No weights are read.",
    ),
]


def explain(
    file: cli.FileArgument = None,
    model: ModelOption = None,
    device: cli.DeviceOption = "cpu",
    executor: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --model: the executor that is asked. Default: auto.")
    ] = None,
) -> None:
    """Says which executors can take a layer, or a model.

    For a layer: one row for each executor, with the reason why not; then what "auto" would choose, and why. With
    --model: one row for each kind of MoE layer, with the executor that takes it and the configuration that was found,
    or why none does; exit status 1 where one is refused.
    """
    if model is not None:
        if file is not None:
            cli.refuse(f"FILE {file}: must be left out with --model {model}")
        _explain_model(model, executor or "auto", device)
        return
    if executor is not None:
        cli.refuse(f"--executor {executor}: must go with --model")
    layer = cli.load(file, device)
    print_rows(executors.explain(layer.x, layer.weights))
    try:
        auto = executors.get("auto")
        chosen, why = auto.choose(layer.x, layer.weights)  # type: ignore[attr-defined]
    except (executors.Unavailable, executors.Unsupported) as error:
        cli.new_console().print(f"auto: {escape(str(error))}")
    else:
        cli.new_console().print(f"auto chooses {chosen}: {escape(why)}")


def _explain_model(name: str, executor: str, device: str) -> None:
    cli.check_device(device)
    try:
        from executors.hf.explain import explain_model, meta_model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        cli.refuse('--model needs transformers: pip install "moe-ref[hf]"')
    try:
        rows = explain_model(meta_model(name), executor, device)
    except ValueError as error:
        cli.refuse(f"--model {error}".replace("--model model=", "--model "))
    except (executors.UnknownExecutor, executors.Unavailable) as error:
        cli.refuse(f"--{error}".replace("--executor=", "--executor "))
    if not rows:
        cli.refuse(f"--model {name}: must have experts; it has none")
    out = Table(width=cli.WIDTH, show_lines=True)
    out.add_column("MoE layers", ratio=1, overflow="fold")
    out.add_column("executor", no_wrap=True)
    out.add_column("experts: configuration, or why not", ratio=1, overflow="fold")
    for row in rows:
        taken = f"[green]{row.executor}[/green]" if row.executor else "[red]none[/red]"
        what = "\n".join(line for line in (row.kind, row.sizes, row.reason or row.config) if line)
        out.add_row(escape(_in_short(row.layers)), taken, escape(what))
    cli.new_console().print(out)
    if any(row.reason for row in rows):
        raise typer.Exit(1)


def _in_short(names: tuple[str, ...]) -> str:
    """Names that differ in one number with its range: "model.layers.[0-31].mlp.experts (32)"."""
    first, last = names[0].split("."), names[-1].split(".")
    differing = [index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]]
    if len(names) == 1 or len(first) != len(last) or len(differing) != 1:
        return ", ".join(names)
    first[differing[0]] = f"[{first[differing[0]]}-{last[differing[0]]}]"
    return f"{'.'.join(first)} ({len(names)})"


def print_rows(rows: list[executors.Explanation], *, kinds: bool = False) -> None:
    """Prints a table, and below it why executors are not usable, and remarks on others.

    Args:
        rows: one for each executor.
        kinds: whether the table has the weights that each of them takes.
    """
    console = cli.new_console()
    out = Table(width=cli.WIDTH)
    out.add_column("executor", max_width=LONGEST_NAME, overflow="fold")
    out.add_column("usable", no_wrap=True)
    out.add_column("from", ratio=1, overflow="fold")
    if kinds:
        out.add_column("weights", max_width=11)
    for row in rows:
        usable = "[green]yes[/green]" if row.usable else "[red]no[/red]"
        weights = [", ".join(row.weights)] if kinds else []
        out.add_row(escape(row.name), usable, escape(row.source.removeprefix(PACKAGE)), *weights)
    console.print(out)
    for title, said in (
        ("not usable:", [(row.name, row.reason) for row in rows if row.reason]),
        ("remarks:", [(row.name, row.note) for row in rows if row.note and not row.reason]),
    ):
        if said:
            console.print(title)
        for name, why in said:
            console.print(
                escape(textwrap.fill(f"{name}: {why}", cli.WIDTH, initial_indent="  ", subsequent_indent="    "))
            )
