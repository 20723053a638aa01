"""The command that runs the benchmark."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape

from executors._bench.measure import MIN_ROUNDS
from executors._cli.options import (
    LARGEST_SEED,
    DeviceOption,
    check_device,
    choice,
    chosen_names,
    make_folder,
    new_console,
    progress_bar,
    refuse,
    within,
)
from executors._compare import report

if TYPE_CHECKING:
    from executors._bench.run import Findings
    from executors._bench.settings import Settings

DEFAULT_RANK = 16


def bench(
    layer: Annotated[
        list[str] | None, typer.Option("--layer", metavar="NAME", help="A model's layer; repeatable.")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(callback=within(1), help="T; repeatable. Default: 1, 8, 64, 512; on a GPU also 4096, 32768."),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(help="real, uniform or skewed; repeatable. Default: real; dense and forward, all three."),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(help="forward, forward_backward or (in 4 bits) lora; repeatable. Default: all."),
    ] = None,
    weights: Annotated[str, typer.Option(help="dense (bf16), or in 4 bits: nf4, fp4 or mxfp4.")] = "dense",
    nested: Annotated[bool, typer.Option("--nested", help="Quantise the scales of nf4 and fp4 too.")] = False,
    lora_rank: Annotated[
        int | None, typer.Option(callback=within(0), help="Of the adapters in 4 bits; 0: none. Default: 16.")
    ] = None,
    memory: Annotated[
        bool | None,
        typer.Option("--memory/--no-memory", help="Measure peak memory. Default: in 4 bits, and on a GPU."),
    ] = None,
    executor: Annotated[
        list[str] | None,
        typer.Option(
            "--executor",
            metavar="NAME",
            help="Only this one of ours; repeatable. Default: all that take such weights, but auto. In 4 bits also one "
            "path of grouped_nf4, such as grouped_nf4[fused], and triton[bf16], on weights that were decoded before.",
        ),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="NAME", help="Leaves out this peer; repeatable.")
    ] = None,
    scale: Annotated[int, typer.Option(callback=within(1), help="Divides H and I, for a quick look.")] = 1,
    seconds: Annotated[
        float | None, typer.Option(callback=within(0), help="How long each case is timed. Default: 10; on a GPU 0.5.")
    ] = None,
    rounds: Annotated[int, typer.Option(callback=within(1), help="Rounds of each case, at least.")] = MIN_ROUNDS,
    limit: Annotated[
        float | None,
        typer.Option(callback=within(0), metavar="SECONDS", help="After so long no further case is begun."),
    ] = None,
    interpreted: Annotated[
        bool, typer.Option("--interpreted", help="Admit interpreted kernels; their times are no measurement.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and the pictures.")] = Path("bench-results"),
    device: DeviceOption = "cpu",
    seed: Annotated[
        int, typer.Option(callback=within(0, LARGEST_SEED), help="Seed of weights, inputs and samples.")
    ] = 0,
) -> None:
    """Times every executor, and what else people use, on layers of real models.

    All contenders get the same random weights and the same tokens, are judged in error bars first, and are timed in
    turn, round by round. Prints a table for each layer, routing and direction, and writes bench.json and bench.png.
    The peers are transformers' experts functions; in 4 bits the same on bitsandbytes' parametrization, and loops
    that decode one expert at a time. There the base is frozen, direction "lora" trains adapters, and each path of
    grouped_nf4 is a contender. On a GPU calls are timed by events from a cold cache, those of up to 64 tokens and
    those with adapters in a CUDA graph too, launches are counted, liger-kernel is one more peer, and roofline.png
    shows how far from the machine's ceilings all of them are. Exit status: 0 if all executors passed, 1 if one
    failed or an executor asked for by name cannot run, 2 for bad arguments. The peers need transformers and
    bitsandbytes: pip install "moe-ref[bench]". On a CPU kt-kernel is one more, forward in bf16, where it is installed.
    """
    from executors._bench import report as bench_report
    from executors._bench import run as benchmark
    from executors._bench import settings as known

    check_device(device)
    choice("--weights", [weights], known.WEIGHTS)
    dense = weights == known.DENSE
    _check_4_bits(weights, nested, lora_rank, direction)
    rank = DEFAULT_RANK if lora_rank is None else lora_rank
    possible = known.DIRECTIONS_IN_4_BITS if rank and not dense else known.DIRECTIONS
    settings = known.Settings(
        names=_names(executor, weights, device, interpreted),
        layers=choice("--layer", layer, known.known_layers()) or known.default_layers(device),
        tokens=tuple(dict.fromkeys(tokens)) if tokens else known.default_tokens(device),
        routings=choice("--routing", routing, known.known_routings()),
        directions=choice("--direction", direction, possible) or possible,
        scale=scale,
        seconds=known.default_seconds(device) if seconds is None else seconds,
        device=device,
        seed=seed,
        load=os.getloadavg()[0],
        weights=weights,
        nested=nested,
        lora_rank=rank,
        memory=not dense or torch.device(device).type == "cuda" if memory is None else memory,
        rounds=rounds,
        limit=limit,
        interpreted=interpreted,
        without=choice("--without", without, known.known_peers()) or (),
    )
    make_folder(out)
    started = time.monotonic()

    def keep(found: Findings) -> None:
        content = bench_report.as_json(settings, found, time.monotonic() - started)
        report.write_json(out / "bench.json", content)

    with progress_bar() as show:
        found = benchmark.run(settings, show, keep)
    keep(found)
    _print(settings, found)
    written = _plot(out, found, settings)
    taken = time.monotonic() - started
    names = ", ".join(["bench.json", *written])
    new_console().print(escape(f"wrote {names} to {out} ({taken:.0f} s)"), soft_wrap=True)
    rows = [row for case in found.cases for row in case.rows if row.ours]
    if any(row.failed for row in rows) or (executor and any(row.reason for row in rows)):
        raise typer.Exit(1)


def _print(settings: Settings, found: Findings) -> None:
    from executors._bench import report as bench_report
    from executors._bench import table as bench_table

    console = new_console()
    console.print(escape("\n".join(bench_report.heading(settings, found.ceilings))))
    for title, table in bench_table.tables(found.cases, found.ceilings):
        console.print(escape(f"\n{title}"))
        console.print(table)
    for line in bench_report.notes(found.cases) + found.left_out:
        console.print(escape(line))


def _names(executor: list[str] | None, weights: str, device: str, interpreted: bool) -> tuple[str, ...]:
    """Our contenders: those asked for, or all that take such weights."""
    from executors._bench import settings as known
    from executors._bench import variants

    ways = [] if weights == known.DENSE else variants.known()
    if not executor:
        return tuple(known.default_names(chosen_names(None), weights, device, interpreted))
    chosen_names([name for name in executor if name not in ways])
    return tuple(dict.fromkeys(executor))


def _check_4_bits(weights: str, nested: bool, lora_rank: int | None, direction: list[str] | None) -> None:
    """Refuses what belongs to 4 bits where weights are dense, and adapters of no rank."""
    adapted, dense = "lora" in (direction or []), weights == "dense"
    if nested and weights not in ("nf4", "fp4"):
        refuse("--nested: must go with --weights nf4 or fp4")
    given = {f"--lora-rank {lora_rank}": lora_rank is not None, "--direction lora": adapted}
    for option in (option for option, is_given in given.items() if is_given and dense):
        refuse(f"{option}: must go with --weights nf4, fp4 or mxfp4")
    if adapted and lora_rank == 0:
        refuse("--lora-rank 0: must be at least 1 with --direction lora")


def _plot(out: Path, found: Findings, settings: Settings) -> list[str]:
    """Writes the pictures, and tells their names: speed against the peers, and on a GPU distance from the ceilings."""
    from executors._bench import plot
    from executors._bench import report as bench_report
    from executors._bench import roofline as bench_roofline

    title = "\n".join(bench_report.machine(settings))
    if not found.cases:
        return []
    plot.plot(out / "bench.png", found.cases, title)
    if not settings.gpu and not settings.interpreted:
        return ["bench.png"]
    bench_roofline.plot(out / "roofline.png", found.cases, found.ceilings, title)
    return ["bench.png", "roofline.png"]
