"""The command that runs the benchmark."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from executors._bench import report, variants
from executors._bench import run as benchmark
from executors._bench import settings as known
from executors._bench import table as bench_table
from executors._bench.case import LORA, BenchRow
from executors._bench.layers import LAYERS
from executors._bench.measure import MIN_ROUNDS
from executors._bench.routing import KINDS
from executors._cli import options as cli
from executors._cli.bench_model import ModelSettings, bench_model
from executors._cli.bench_ranks import bench_ranks
from executors._files.whole import write_json

DEFAULT_RANK = 16
MOST_RANKS = 64
OF_MODELS = ("model", "set", "tokens", "direction", "executor", "seconds", "out", "device", "seed")  # with --model
OF_RANKS = {  # with --ranks
    *("ranks", "layer", "tokens", "routing", "direction", "weights", "nested", "executor"),
    *("scale", "seconds", "rounds", "out", "seed"),
}


@dataclass(frozen=True)
class BenchOptions:
    """What can be asked of the benchmark."""

    layer: Annotated[list[str] | None, typer.Option("--layer", metavar="NAME", help="A model's layer; repeatable.")] = (
        None
    )
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS_OR_DIR",
            help="Instead of layers: the first MoE block of a model class of transformers, or of a folder with a "
            "config.json, with random weights; on every way to run its experts.",
        ),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="With --model: change its configuration; repeatable."),
    ] = None
    ranks: Annotated[
        int | None,
        typer.Option(
            callback=cli.within(1, MOST_RANKS),
            help="Spread the experts over so many processes of this machine, and time them against transformers' "
            "expert parallelism and against one process.",
        ),
    ] = None
    tokens: Annotated[
        list[int] | None,
        typer.Option(callback=cli.within(1), help="T; repeatable. Default: 1, 8, 64, 512; on a GPU also 4096, 32768."),
    ] = None
    routing: Annotated[
        list[str] | None,
        typer.Option(help="real, uniform or skewed; repeatable. Default: real; dense and forward, all three."),
    ] = None
    direction: Annotated[
        list[str] | None, typer.Option(help="forward, forward_backward or (in 4 bits) lora; repeatable. Default: all.")
    ] = None
    weights: Annotated[str, typer.Option(help="dense (bf16), or in 4 bits: nf4, fp4 or mxfp4.")] = known.DENSE
    nested: Annotated[bool, typer.Option("--nested", help="Quantise the scales of nf4 and fp4 too.")] = False
    lora_rank: Annotated[
        int | None, typer.Option(callback=cli.within(0), help="Of the adapters in 4 bits; 0: none. Default: 16.")
    ] = None
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="Measure peak memory. Default: in 4 bits, and on a GPU.")
    ] = None
    executor: Annotated[
        list[str] | None,
        typer.Option(
            "--executor",
            metavar="NAME",
            help="Only this one of ours; repeatable. Default: all that take such weights, but auto. In 4 bits also one "
            "path of grouped_nf4, such as grouped_nf4[fused], and triton[bf16], on weights that were decoded before.",
        ),
    ] = None
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="NAME", help="Leave out this peer; repeatable.")
    ] = None
    scale: cli.ScaleOption = 1
    seconds: Annotated[
        float | None, typer.Option(callback=cli.within(0), help="How long a case is timed. Default: 10; on a GPU 0.5.")
    ] = None
    rounds: cli.RoundsOption = MIN_ROUNDS
    limit: cli.LimitOption = None
    interpreted: cli.InterpretedOption = False
    out: Annotated[Path, typer.Option(help="Folder for bench.json and the pictures.")] = Path("bench-results")
    device: cli.DeviceOption = "cpu"
    seed: cli.SeedOption = 0

    def settings(self) -> known.Settings:
        """The settings, checked, with the defaults for what was not asked for."""
        device = self.device
        cli.check_device(device)
        cli.checked("--weights", [self.weights], known.WEIGHTS)
        self._check_4_bits()
        in_4_bits, rank = self.weights != known.DENSE, DEFAULT_RANK if self.lora_rank is None else self.lora_rank
        possible = known.DIRECTIONS_IN_4_BITS if rank and in_4_bits else known.DIRECTIONS
        on_gpu = torch.device(device).type == "cuda"
        return known.Settings(
            names=self._names(),
            layers=cli.checked("--layer", self.layer, tuple(LAYERS)) or known.default(known.DEFAULT_LAYERS, device),
            tokens=tuple(dict.fromkeys(self.tokens or known.default(known.DEFAULT_TOKENS, device))),
            routings=cli.checked("--routing", self.routing, KINDS),
            directions=cli.checked("--direction", self.direction, possible) or possible,
            scale=self.scale,
            seconds=known.default(known.DEFAULT_SECONDS, device) if self.seconds is None else self.seconds,
            device=device,
            seed=self.seed,
            load=os.getloadavg()[0],
            weights=self.weights,
            nested=self.nested,
            lora_rank=rank,
            memory=in_4_bits or on_gpu if self.memory is None else self.memory,
            rounds=self.rounds,
            limit=self.limit,
            interpreted=self.interpreted,
            without=cli.checked("--without", self.without, known.known_peers()) or (),
        )

    def model_settings(self, model: str) -> ModelSettings:
        """The settings of a whole block, checked."""
        cli.check_device(self.device)
        self._refuse_others("--model", OF_MODELS)
        return ModelSettings(
            model=model,
            changes=tuple(self.set or ()),
            tokens=tuple(dict.fromkeys(self.tokens or known.default(known.DEFAULT_TOKENS, self.device))),
            directions=cli.checked("--direction", self.direction, known.DIRECTIONS) or known.DIRECTIONS,
            names=self._names(),
            seconds=known.default(known.DEFAULT_SECONDS, self.device) if self.seconds is None else self.seconds,
            device=self.device,
            seed=self.seed,
        )

    def ranks_settings(self) -> known.Settings:
        """The settings of expert parallelism, checked."""
        self._refuse_others("--ranks", OF_RANKS)
        if LORA in (self.direction or []):
            cli.refuse(f"--direction {LORA}: must be left out with --ranks")
        found = self.settings()
        default = "native" if self.weights == known.DENSE else "grouped_nf4"
        return replace(
            found,
            names=tuple(cli.chosen_names(self.executor)) if self.executor else (default,),
            routings=found.routings or KINDS[:1],
            directions=tuple(way for way in found.directions if way != LORA),
            lora_rank=0,
            memory=False,
        )

    def _refuse_others(self, given: str, allowed: Collection[str]) -> None:
        """Refuses options that do not go with another."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in allowed and value != option.default:
                shown = "" if value is True else f" {value[0] if isinstance(value, list) else value}"
                cli.refuse(f"--{option.name.replace('_', '-')}{shown}: must be left out with {given}")

    def _names(self) -> tuple[str, ...]:
        """Our contenders: those asked for, or all that take such weights."""
        if not self.executor:
            return tuple(known.default_names(cli.chosen_names(None), self.weights, self.device, self.interpreted))
        ways = [] if self.weights == known.DENSE else variants.known()
        cli.chosen_names([name for name in self.executor if name not in ways])
        return tuple(dict.fromkeys(self.executor))

    def _check_4_bits(self) -> None:
        """Refuses options for 4 bits where weights are dense, and adapters of rank 0."""
        adapted = LORA in (self.direction or [])
        if self.nested and self.weights not in ("nf4", "fp4"):
            cli.refuse("--nested: must go with --weights nf4 or fp4")
        given = {f"--lora-rank {self.lora_rank}": self.lora_rank is not None, "--direction lora": adapted}
        for option in (option for option, is_given in given.items() if is_given and self.weights == known.DENSE):
            cli.refuse(f"{option}: must go with --weights nf4, fp4 or mxfp4")
        if adapted and self.lora_rank == 0:
            cli.refuse("--lora-rank 0: must be at least 1 with --direction lora")


@cli.with_options(BenchOptions)
def bench(options: BenchOptions) -> None:
    """Times executors and their peers on layers of real models.

    All contenders get the same random weights and tokens. Each is judged in error bars, and then all are timed in turn,
    round by round. Prints a table for each layer, routing and direction, and writes bench.json and bench.png.

    The peers are transformers' experts functions; the extra "bench" installs what they need. On a CPU kt-kernel is one
    more, forward in bf16, and on a GPU liger-kernel, where they are installed. In 4 bits the peers are transformers'
    experts functions on bitsandbytes' parametrization, and loops that decode one expert at a time. The base is frozen
    there, direction "lora" trains adapters, and each path of grouped_nf4 is a contender.

    On a GPU calls are timed by events from a cold cache. Those of up to 64 tokens and those with adapters are timed in
    a CUDA graph too, launches are counted, and roofline.png shows how far from the machine's ceilings all of them are.

    With --model it times a whole block of a transformers model instead: router, experts and what stands beside them.
    The experts run on transformers' eager, grouped_mm and batched_mm, and on executors. Each is judged first, on what
    the block gives to its experts: an output or gradient may be three times as far from a wider copy as
    eager's, at most (2-norms).

    With --ranks the experts are spread over processes of this machine, by gloo. `executors.parallel` around an executor
    is timed in each of its ways against transformers' expert parallelism, and against one process that has all tokens
    and all experts, with one thread and with as many as there are ranks.

    Exit status: 0 if all executors passed, 1 if one failed or an executor asked for by name cannot run, 2 for bad
    arguments.
    """
    if options.model is not None:
        of_block = bench_model(options.model_settings(options.model), options.out)
        if any(row.failed or (row.reason and row.ours and options.executor) for row in of_block):
            raise typer.Exit(1)
        return
    if options.ranks is not None:
        spread = bench_ranks(options.ranks_settings(), options.ranks, options.out)
        _end(options, [row for case in spread for row in case.rows if row.ours])
        return
    if options.set:
        cli.refuse(f"--set {options.set[0]}: must go with --model")
    settings, out = options.settings(), options.out
    cli.make_folder(out)
    started = time.monotonic()

    def keep(found: benchmark.Findings) -> None:
        write_json(out / "bench.json", report.as_json(settings, found, time.monotonic() - started))

    with cli.progress_bar() as show:
        found = benchmark.run(settings, show, keep)
    keep(found)
    _print(settings, found)
    cli.print_written(out, ["bench.json", *_plot(out, found, settings)], started)
    _end(options, [row for case in found.cases for row in case.rows if row.ours])


def _end(options: BenchOptions, rows: list[BenchRow]) -> None:
    """Ends with exit status 1 if an executor is wrong, or cannot run though it was asked for by name."""
    if any(row.failed or (row.reason and options.executor) for row in rows):
        raise typer.Exit(1)


def _print(settings: known.Settings, found: benchmark.Findings) -> None:
    console = cli.new_console()
    console.print(escape("\n".join(report.heading(settings, found.ceilings))))
    for title, table in bench_table.tables(found.cases, found.ceilings):
        console.print(escape(f"\n{title}"))
        console.print(table)
    for line in report.notes(found.cases) + found.left_out:
        console.print(escape(line))


def _plot(out: Path, found: benchmark.Findings, settings: known.Settings) -> list[str]:
    """Writes the pictures, and returns their names."""
    from executors._bench import plot, roofline  # matplotlib takes a second to import: only where it is needed

    title = "\n".join(report.machine(settings))
    if not found.cases:
        return []
    plot.plot(out / "bench.png", found.cases, title)
    if not settings.gpu and not settings.interpreted:
        return ["bench.png"]
    roofline.plot(out / "roofline.png", found.cases, found.ceilings, title)
    return ["bench.png", "roofline.png"]
