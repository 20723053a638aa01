"""Fine-tune a gpt-oss model with its experts in 4 bits, by three ways to compute them, and compare losses and speed.

    python examples/qlora_finetune.py

takes the bundled model of data/README.md, which was trained on Python's documentation, packs its experts into NF4, puts
adapters of PEFT on attention and experts, and trains them with AdamW on the source of Python's library. It does so with
each contender: a loop over experts as people run it, transformers' grouped_mm on the decoded stack, and an executor of
this project. Then it saves the adapter, reads it back into a new model, and lets that write.

``--model random`` with its sizes, or ``--model FOLDER`` with transformers' files, takes another model. A run that was
killed goes on where it was, with the same losses to the last bit. docs/fine-tuning.md has the parts one by one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import executors
from executors._cli.options import (
    LARGEST_SEED,
    DeviceOption,
    check_device,
    new_console,
    print_lines,
    print_written,
    refuse,
    with_options,
    within,
)
from executors._compare.report import chip
from executors._files.whole import write_json
from qlora import adapter, models
from qlora.contenders import LOOP, PEERS, STACK, switch
from qlora.contest import Contest, exact_losses, hold
from qlora.models import BUNDLED, DEFAULT, RANDOM
from qlora.plot import plot
from qlora.report import Results, as_json, lines, table
from qlora.setup import Setup, adapted, base_model, reader, windows

NAME = "qlora_finetune"
NEW_TOKENS = 160


@dataclass(frozen=True)
class Options:
    """Of the command."""

    model: Annotated[str, typer.Option(help="bundled, random, 20b (random, of gpt-oss-20b's sizes), or a folder.")] = (
        BUNDLED
    )
    experts: Annotated[
        list[str] | None,
        typer.Option("--experts", metavar="NAME", help="Who computes them; repeatable. Default: loop, stack, auto."),
    ] = None
    steps: Annotated[int, typer.Option(callback=within(1), help="Optimiser steps.")] = 20
    windows: Annotated[int, typer.Option(callback=within(1), help="Windows of text in a step.")] = 16
    context: Annotated[int, typer.Option(callback=within(2), help="Tokens in a window.")] = 256
    rank: Annotated[int, typer.Option(callback=within(1), help="Of the adapters.")] = 8
    learning_rate: Annotated[float, typer.Option(callback=within(0), help="After a warm-up of 5 steps.")] = 5e-4
    accumulate: Annotated[int, typer.Option(callback=within(1), help="Parts into which a step is cut.")] = 1
    checkpointing: Annotated[
        Literal["none", "reentrant", "non-reentrant"], typer.Option(help="Build activations anew in the backward pass.")
    ] = "none"
    layers: Annotated[int, typer.Option(callback=within(1), help="Of a random model.")] = DEFAULT.layers
    hidden: Annotated[int, typer.Option(callback=within(1), help="Of a random model.")] = DEFAULT.hidden
    intermediate: Annotated[int, typer.Option(callback=within(1), help="Of a random model.")] = DEFAULT.intermediate
    num_experts: Annotated[int, typer.Option(callback=within(1), help="Of a random model.")] = DEFAULT.experts
    top_k: Annotated[int, typer.Option(callback=within(1), help="Of a random model.")] = DEFAULT.layer.top_k or 1
    device: DeviceOption = "cpu"
    seed: Annotated[int, typer.Option(callback=within(0, LARGEST_SEED), help="Of adapters and random models.")] = 0
    save_every: Annotated[int, typer.Option(callback=within(1), help="Steps between two states on disk.")] = 5
    memory: Annotated[bool, typer.Option(help="Measure each contender's peak, in a process of its own.")] = True
    exact: Annotated[bool, typer.Option(help="Train in fp32 too, to see how far rounding alone moves losses.")] = True
    output: Annotated[Path, typer.Option(help="Folder for states, adapter, JSON and PNG.")] = Path("finetune-results")


@with_options(Options)
def main(options: Options) -> None:
    """Fine-tunes a model with its experts in 4 bits, by several ways to compute them.

    Exit status 1 where the adapter does not come back as it was, or where losses are more than 0.0022 nats from those
    of the first contender and farther from those of the run in fp32 than these are; 2 for bad arguments.
    """
    started = time.monotonic()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it of deterministic runs on a GPU
    check_device(options.device)
    names = _names(options.experts)
    setup = _setup(options)
    try:
        windows(setup)
        (options.output / "state").mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        refuse(f"--steps {options.steps}: {error}")
    except OSError as error:
        refuse(f"--output {options.output}: must be a folder that can be written: {error}")
    torch.use_deterministic_algorithms(True)
    console = new_console()
    with Progress(
        *(TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("packing experts into NF4")
        model = adapted(_base(setup, lambda done, total: bar.update(task, completed=done, total=total)), setup)
        exact = options.exact and setup.model in (BUNDLED, RANDOM)
        contest = Contest(setup, names, options.output / "state", options.save_every, options.memory, exact)

        def tell(name: str, step: int) -> None:
            done = contest.runs.index(name) * setup.steps + step
            bar.update(task, completed=done, description=f"training with {name}")

        bar.update(task, completed=0, total=setup.steps * len(contest.runs))
        try:
            losses = exact_losses(contest, tell)
            found = hold(contest, model, tell)
        except (ValueError, executors.Unsupported, executors.Unavailable) as error:
            refuse(" ".join(str(error).split()))
        bar.update(task, description="saving the adapter, and reading it back")
        executor = "auto" if names[-1] in PEERS else names[-1]  # a peer has none to read it back on
        logits, before = _saved(model, setup, executor, options.output / "adapter")
        del model  # before there is another
        same, after = _back(setup, executor, options.output / "adapter", logits)
    results = Results(found, losses, reader(setup).unit, same, before, after)
    console.print(table(results))
    print_lines(lines(results))
    arguments = setup.as_json() | {"experts": names}
    write_json(options.output / f"{NAME}.json", as_json(results, arguments))
    where = chip(options.device)
    title = f"{setup.model} model, experts in NF4, adapters of rank {setup.rank}, {setup.tokens} tokens a step\n{where}"
    plot(options.output / f"{NAME}.png", results, title)
    print_written(options.output, [f"{NAME}.json", f"{NAME}.png", "adapter/"], started)
    raise typer.Exit(0 if results.ok else 1)


def _names(chosen: list[str] | None) -> tuple[str, ...]:
    known = (*PEERS, *executors.names())
    for name in chosen or ():
        if name not in known:
            refuse(f"--experts {name}: must be one of {', '.join(known)}")
    return tuple(dict.fromkeys(chosen or (LOOP, STACK, "auto")))


def _setup(options: Options) -> Setup:
    shape = replace(
        DEFAULT,
        layers=options.layers,
        hidden=options.hidden,
        intermediate=options.intermediate,
        experts=options.num_experts,
        layer=replace(DEFAULT.layer, top_k=options.top_k),
    )
    model = options.model
    if model == "20b":
        model, shape = RANDOM, models.TWENTY_B
    elif model not in (BUNDLED, RANDOM):
        if not Path(model).is_dir():
            refuse(f"--model {model}: must be bundled, random, 20b, or a folder with transformers' files")
        model = str(Path(model).resolve())
    if options.top_k > options.num_experts:
        refuse(f"--top-k {options.top_k}: must be at most {options.num_experts}, the number of experts")
    return Setup(
        model,
        shape,
        options.steps,
        options.windows,
        options.context,
        options.rank,
        options.learning_rate,
        options.accumulate,
        options.checkpointing,
        options.device,
        options.seed,
    )


def _base(setup: Setup, progress: Any) -> Any:
    try:
        return base_model(setup, progress)
    except (OSError, ValueError, executors.Unsupported) as error:
        refuse(f"--model {setup.model}: {' '.join(str(error).split())}")


def _saved(model: Any, setup: Setup, executor: str, folder: Path) -> tuple[Tensor, str]:
    """Writes the adapter's files; the logits with it, and what the model writes without it."""
    switch(model, executor)
    logits = adapter.logits(model, windows(setup)[0])
    with model.disable_adapter():
        plain = adapter.written(model, setup, NEW_TOKENS)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return logits, plain


def _back(setup: Setup, executor: str, folder: Path, logits: Tensor) -> tuple[bool, str]:
    """Whether a new model with the adapter's files has the same logits to the last bit, and what it writes."""
    back = adapter.reloaded(folder, setup, executor)
    same = torch.equal(logits, adapter.logits(back, windows(setup)[0]))
    return same, adapter.written(back, setup, NEW_TOKENS)


if __name__ == "__main__":
    app = typer.Typer()
    app.command()(main)
    app()
