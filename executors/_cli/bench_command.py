"""The command that runs the benchmark."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from executors._cli import report
from executors._cli.common import (
    LARGEST_SEED,
    DeviceOption,
    check_device,
    choice,
    chosen_names,
    make_folder,
    new_console,
    progress_bar,
    refuse,
)

if TYPE_CHECKING:
    from executors._cli.bench_case import Case

DEFAULT_RANK = 16


def bench(
    layer: Annotated[
        list[str] | None, typer.Option("--layer", metavar="NAME", help="A model's layer; repeatable.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="T; repeatable. Default: 1, 8, 64, 512.")] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(help="real, uniform or skewed; repeatable. Default: real; dense and forward, all three."),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(help="forward, forward_backward or (in 4 bits) lora; repeatable. Default: all."),
    ] = None,
    weights: Annotated[str, typer.Option(help="dense (bf16), or in 4 bits: nf4 or fp4.")] = "dense",
    nested: Annotated[bool, typer.Option("--nested", help="Quantise the scales of 4 bits too.")] = False,
    lora_rank: Annotated[
        int | None, typer.Option(min=0, help="Of the adapters in 4 bits; 0: none. Default: 16.")
    ] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="Measure peak memory. Default: in 4 bits only.")
    ] = None,
    executor: Annotated[
        list[str] | None,
        typer.Option(
            "--executor",
            metavar="NAME",
            help="Only this one of ours; repeatable. Default: all that take such weights, but auto.",
        ),
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Divides H and I, for a quick look.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each case is timed; 7 rounds at least.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench-results"),
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights, inputs and samples.")] = 0,
) -> None:
    """Times every executor, and what else people use, on layers of real models.

    All contenders get the same random weights and the same tokens, are judged in error bars first, and are timed in
    turn, round by round. Prints a table for each layer, routing and direction, and writes bench.json and bench.png. The
    peers are transformers' experts functions; in 4 bits the same on bitsandbytes' parametrization, and loops that
    decode one expert at a time. There the base is frozen, and direction "lora" trains adapters. Exit status: 0 if all
    executors passed, 1 if one failed or an executor asked for by name cannot run, 2 for bad arguments. The peers need
    transformers and bitsandbytes: pip install "moe-ref[bench]".
    """
    from executors._cli import bench as benchmark
    from executors._cli import bench_report, bench_table

    check_device(device)
    choice("--weights", [weights], benchmark.WEIGHTS)
    dense = weights == benchmark.DENSE
    _check_4_bits(dense, nested, lora_rank, direction)
    rank = DEFAULT_RANK if lora_rank is None else lora_rank
    possible = benchmark.DIRECTIONS_IN_4_BITS if rank and not dense else benchmark.DIRECTIONS
    settings = benchmark.Settings(
        names=tuple(n for n in chosen_names(executor) if executor or benchmark.takes(n, weights)),
        layers=tuple(choice("--layer", layer, benchmark.known_layers()) or benchmark.DEFAULT_LAYERS),
        tokens=tuple(dict.fromkeys(tokens)) if tokens else benchmark.default_tokens(device),
        routings=choice("--routing", routing, benchmark.known_routings()),
        directions=choice("--direction", direction, possible) or possible,
        scale=scale,
        seconds=seconds,
        device=device,
        seed=seed,
        load=os.getloadavg()[0],
        weights=weights,
        nested=nested,
        lora_rank=rank,
        memory=not dense if memory is None else memory,
    )
    make_folder(out)
    started = time.monotonic()
    with progress_bar() as show:
        ceilings, cases = benchmark.run(settings, show)
    console = new_console()
    heading = bench_report.heading(settings, ceilings)
    console.print(escape("\n".join(heading)))
    for title, table in bench_table.tables(cases, ceilings):
        console.print(escape(f"\n{title}"))
        console.print(table)
    for line in bench_report.notes(cases):
        console.print(escape(line))
    taken = time.monotonic() - started
    report.write_json(out / "bench.json", bench_report.as_json(settings, ceilings, cases, taken))
    _plot(out / "bench.png", cases, "\n".join(bench_report.machine(settings)))
    console.print(escape(f"wrote {out / 'bench.json'} and {out / 'bench.png'} ({taken:.0f} s)"))
    rows = [row for case in cases for row in case.rows if row.ours]
    if any(row.failed for row in rows) or (executor and any(row.reason for row in rows)):
        raise typer.Exit(1)


def _check_4_bits(dense: bool, nested: bool, lora_rank: int | None, direction: list[str] | None) -> None:
    """Refuses what belongs to 4 bits where weights are dense, and adapters of no rank."""
    adapted = "lora" in (direction or [])
    given = {"--nested": nested, f"--lora-rank {lora_rank}": lora_rank is not None, "--direction lora": adapted}
    for option in (option for option, is_given in given.items() if is_given and dense):
        refuse(f"{option}: must go with --weights nf4 or fp4")
    if adapted and lora_rank == 0:
        refuse("--lora-rank 0: must be at least 1 with --direction lora")


def _plot(path: Path, cases: list[Case], title: str) -> None:
    from executors._cli.bench_plot import plot  # matplotlib takes a second to import: only where it is needed

    plot(path, cases, title)
