"""The command that measures where decoding in the products stops to pay."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape

from executors._cli.options import (
    LARGEST_SEED,
    check_device,
    choice,
    make_folder,
    new_console,
    progress_bar,
    refuse,
    within,
)
from executors._compare import report

if TYPE_CHECKING:
    from executors._crossover.points import Curve
    from executors._crossover.run import Plan

LAYERS = ("gpt-oss-20b", "qwen3-30b-a3b")
ROWS = tuple(2**power for power in range(11))
RANK = 16
SECONDS = 0.2


def crossover(
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME", help=f"A model's layer; repeatable. Default: {', '.join(LAYERS)}."),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="nf4, nf4-nested, fp4 or mxfp4; repeatable. Default: all but fp4.")
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(callback=within(1), help="Mean rows per expert, S/E; repeatable. Default: 1, 2, 4, ... 1024."),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(help="forward, or lora (with backward and adapters); repeatable. Default: both."),
    ] = None,
    routing: Annotated[str, typer.Option(help="real, uniform or skewed.")] = "real",
    seconds: Annotated[float, typer.Option(callback=within(0), help="How long each point is timed.")] = SECONDS,
    rounds: Annotated[int, typer.Option(callback=within(1), help="Rounds of each point, at least.")] = 7,
    limit: Annotated[
        float | None,
        typer.Option(callback=within(0), metavar="SECONDS", help="After so long no further point is begun."),
    ] = None,
    scale: Annotated[int, typer.Option(callback=within(1), help="Divides H and I, for a quick look.")] = 1,
    interpreted: Annotated[
        bool, typer.Option("--interpreted", help="Run interpreted kernels; their times are no measurement.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for crossover.json and crossover.png.")] = Path("crossover-results"),
    commit: Annotated[str | None, typer.Option(metavar="TEXT", help="Of this code, where git cannot tell.")] = None,
    device: Annotated[str | None, typer.Option(help="Which GPU, such as cuda:1.")] = None,
    seed: Annotated[int, typer.Option(callback=within(0, LARGEST_SEED), help="Seed of weights and inputs.")] = 0,
) -> None:
    """Measures up to how many rows per expert 4 bits are better decoded in the products than before them.

    For layers of real models and formats of 4 bits, forward and with adapters that are trained: grouped_nf4 on each of
    its paths, and triton in bf16 on weights that were decoded before, on the same inputs, in turn, from a cold cache,
    for more and more tokens. Both ways must be right and agree before they are timed. Prints tables, writes
    crossover.json and crossover.png, and tells the rule that loses least on this device. Exit status: 0 if all were
    right, 1 if not, 2 for bad arguments.
    """
    from executors._bench import settings as known
    from executors._crossover import run

    plan = run.Plan(
        layers=choice("--layer", layer, known.known_layers()) or LAYERS,
        formats=choice("--weights", weights, list(run.FORMATS)) or run.DEFAULT_FORMATS,
        directions=choice("--direction", direction, run.DIRECTIONS) or run.DIRECTIONS,
        rows=tuple(sorted(set(rows or ROWS))),
        routing=(choice("--routing", [routing], known.known_routings()) or (routing,))[0],
        seconds=seconds,
        rounds=rounds,
        limit=limit,
        scale=scale,
        device=_device(device, interpreted),
        seed=seed,
        rank=RANK,
        interpreted=interpreted,
    )
    make_folder(out)
    started = time.monotonic()
    console = new_console()

    def keep(curves: list[Curve], left_out: list[str], complete: bool) -> None:
        from executors._crossover import report as crossover_report

        content = crossover_report.as_json(plan, curves, left_out, complete, commit, time.monotonic() - started)
        report.write_json(out / "crossover.json", content)

    with progress_bar() as show:
        curves, left_out = run.run(plan, show, keep)
    _print(plan, curves, left_out)
    written = ["crossover.json"]
    if any(curve.points for curve in curves):
        from executors._crossover import plot

        plot.plot(out / "crossover.png", curves, plan)
        written.append("crossover.png")
    taken = time.monotonic() - started
    console.print(escape(f"wrote {', '.join(written)} to {out} ({taken:.0f} s)"), soft_wrap=True)
    if any(point.failure for curve in curves for point in curve.points):
        raise typer.Exit(1)


def _print(plan: Plan, curves: list[Curve], left_out: list[str]) -> None:
    from executors._crossover import report as crossover_report

    console = new_console()
    console.print(escape("\n".join(crossover_report.heading(plan))))
    for curve in curves:
        console.print(escape(f"\n{crossover_report.title(curve)}"))
        console.print(crossover_report.table(curve, plan.interpreted))
        console.print(escape(crossover_report.found(curve, plan.interpreted)), soft_wrap=True)
    for line in [*left_out, *crossover_report.remarks(curves)]:
        console.print(escape(line), soft_wrap=True)
    console.print(escape("\n".join(["", *crossover_report.suggestion(plan, curves)])), soft_wrap=True)


def _device(device: str | None, interpreted: bool) -> str:
    """Where it runs; refused where the kernels cannot, or where they are interpreted and nobody said so."""
    try:
        from executors._triton.device import INTERPRETED
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        refuse('crossover needs triton: pip install "moe-ref[triton]"')
    if interpreted and not INTERPRETED:
        refuse("--interpreted: must go with TRITON_INTERPRET=1")
    if INTERPRETED and not interpreted:
        refuse("TRITON_INTERPRET=1: must go with --interpreted, since times mean nothing then")
    if not INTERPRETED and not torch.cuda.is_available():
        refuse("crossover needs a GPU; TRITON_INTERPRET=1 and --interpreted go through it without one")
    found = device or ("cpu" if INTERPRETED else "cuda")
    check_device(found)
    if not INTERPRETED and torch.device(found).type != "cuda":
        refuse(f"--device {found}: must be a GPU")
    return found
