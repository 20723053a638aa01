"""Continue the training of the bundled model with its experts on an executor of your choice, and judge the losses.

    python examples/train_tiny.py --executor native --executor grouped_mm --steps 20 --output train-results

The bundled layer (data/README.md) comes from a byte-level gpt-oss model of three layers. A second file holds the rest
of that model: the experts of its two other layers in 4 bits (NF4), everything else in bf16. Together they are the
trained model: its held-out loss is 1.192 nats per byte, 1.191 before it was stored. Here its training goes on, on text
that it has not read: the bytes from which the bundled hidden states were made. Nothing is frozen: the experts of all
three layers are widened and trained, and so are routers, attention, norms and embeddings. (Not all is as it was: the
optimiser begins without memory, the bytes are the same at each step, and no loss evens out the routing.)

Three places show how a model calls an executor: `tiny.model.MoE` hands over x, the router's logits and a view of its
parameters; `tiny.model.Experts.weights` makes that view of weights stored as (E, H, 2I); `tiny.training.on_executor`
narrows them to the dtype in which experts are computed. Everything else is in float64, so that what the runs differ
in is the experts, and nothing but the experts.

Losses that look alike prove little. How far they may differ is measured here: `tiny.judgement`, docs/training.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import executors
from executors._cli.options import LARGEST_SEED, DeviceOption, check_device, new_console, refuse, within
from executors._files.whole import write_json
from moe_ref.conformance.mutants import mutants
from tiny.checkpoint import bundled_model
from tiny.contest import Contest, hold
from tiny.judgement import FEWEST
from tiny.model import Experts, Model
from tiny.plot import plot
from tiny.report import as_json, lines, table
from tiny.text import unread_windows
from tiny.training import Recipe

EXECUTORS = ("native", "grouped_mm")
NAME = "train_tiny"


def main(
    executor: Annotated[
        list[str] | None, typer.Option("--executor", metavar="NAME", help="Repeatable. Default: native, grouped_mm.")
    ] = None,
    mutant: Annotated[
        list[str] | None,
        typer.Option("--mutant", metavar="NAME", help="A deliberately wrong form of the first executor; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(callback=within(1), help="Optimiser steps.")] = 20,
    windows: Annotated[int, typer.Option(callback=within(1), help="Windows of text, all of them in every step.")] = 2,
    context: Annotated[
        int, typer.Option(callback=within(1, 256), help="Bytes in a window; it was trained with 256.")
    ] = 256,
    honest: Annotated[
        int, typer.Option(callback=within(FEWEST), help="Honest runs, which say how far losses may differ.")
    ] = 8,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="In which experts are computed.")] = "float32",
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(callback=within(0, LARGEST_SEED), help="Of the errors of honest runs.")] = 0,
    output: Annotated[Path, typer.Option(help=f"Folder for {NAME}.json and {NAME}.png.")] = Path("train-results"),
) -> None:
    """Continues the training of the bundled model, and compares the losses with those of exact experts.

    Exit status 1 where the losses of an executor differ by more than rounding allows, 2 for bad arguments.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it of deterministic runs on a GPU
    check_device(device)
    names = list(dict.fromkeys(executor or EXECUTORS))
    try:
        text = unread_windows(windows, context).to(device)
    except ValueError as error:
        refuse(f"--windows {windows}: {error}")
    model = bundled_model().to(device)
    chosen = {name: usable(name, model, dtype) for name in names}
    wrong = {name: mutant_of(chosen[names[0]], name) for name in mutant or []}
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {output}: must be a folder that can be written: {error.strerror}")

    torch.use_deterministic_algorithms(True)
    contest = Contest(model, text, Recipe(steps), dtype, honest, seed)
    console = new_console()
    with Progress(
        *(TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=steps * contest.runs(chosen, wrong))
        results = hold(contest, chosen, wrong, lambda name: bar.update(task, advance=1, description=name))
    console.print(table(results))
    for line in lines(results):
        console.print(line, markup=False)
    arguments = {"executors": names, "mutants": list(wrong), "steps": steps, "windows": windows, "context": context}
    arguments |= {"honest": honest, "dtype": dtype, "device": device, "seed": seed}
    write_json(output / f"{NAME}.json", as_json(results, arguments))
    where = "the CPU" if device == "cpu" else device
    plot(
        output / f"{NAME}.png",
        results,
        f"The bundled model's training goes on: {dtype} experts on {where}, {windows * context} bytes a step",
    )
    raise typer.Exit(1 if results.failed else 0)


def usable(name: str, model: Model, dtype: str) -> executors.Executor:
    """The executor of that name, if it can train this model; else the program ends with one line."""
    try:
        executor = executors.get(name)
        if not executor.capabilities.backward:
            refuse(f"--executor {name}: must have gradients, and declares that it has none")
        experts = next(module for module in model.modules() if isinstance(module, Experts))
        weights = experts.weights().map(lambda parameter: parameter.detach().to(getattr(torch, dtype)))
        executor.check(torch.zeros_like(weights.gate_up_proj[0]), weights)  # any x of width H
    except (executors.UnknownExecutor, executors.Unavailable, executors.Unsupported) as error:
        refuse(f"--executor {name}: {' '.join(str(error).split())}")
    return executor


def mutant_of(executor: executors.Executor, name: str) -> executors.Executor:
    """A deliberately wrong form of the executor."""
    known = mutants(executor)
    if name not in known:
        refuse(f"--mutant {name}: must be one of {', '.join(sorted(known))}")
    return known[name]


if __name__ == "__main__":
    typer.run(main)
