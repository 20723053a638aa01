"""The command that measures up to how many rows decoding in the products pays."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from executors._bench import layers as bench_layers
from executors._bench.routing import KINDS
from executors._cli import options as cli
from executors._files.whole import write_json

if TYPE_CHECKING:
    from executors._crossover.points import CrossoverCurve
    from executors._crossover.run import CrossoverPlan

LAYERS = ("gpt-oss-20b", "qwen3-30b-a3b")
ROWS = tuple(2**power for power in range(11))
RANK = 16
SECONDS = 0.2


@dataclass(frozen=True)
class CrossoverOptions:
    """What can be asked of a measurement of the crossover."""

    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME", help=f"A model's layer; repeatable. Default: {', '.join(LAYERS)}."),
    ] = None
    weights: Annotated[
        list[str] | None, typer.Option(help="nf4, nf4-nested, fp4 or mxfp4; repeatable. Default: all but fp4.")
    ] = None
    rows: Annotated[
        list[int] | None,
        typer.Option(callback=cli.within(1), help="Mean rows per expert, S/E; repeatable. Default: 1, 2, 4, ... 1024."),
    ] = None
    direction: Annotated[
        list[str] | None, typer.Option(help="forward, or lora (with backward and adapters); repeatable. Default: both.")
    ] = None
    routing: Annotated[str, typer.Option(help="real, uniform or skewed.")] = "real"
    seconds: Annotated[float, typer.Option(callback=cli.within(0), help="How long each point is timed.")] = SECONDS
    rounds: cli.RoundsOption = 7
    limit: cli.LimitOption = None
    scale: cli.ScaleOption = 1
    interpreted: cli.InterpretedOption = False
    out: Annotated[Path, typer.Option(help="Folder for crossover.json and crossover.png.")] = Path("crossover-results")
    commit: Annotated[str | None, typer.Option(metavar="TEXT", help="Of this code, where git cannot tell.")] = None
    device: cli.GpuOption = None
    seed: cli.SeedOption = 0

    def plan(self) -> CrossoverPlan:
        """The plan, checked, with the defaults for what was not asked for."""
        with cli.needing_triton("crossover needs"):
            from executors._crossover import run
        cli.checked("--routing", [self.routing], KINDS)
        return run.CrossoverPlan(
            layers=cli.checked("--layer", self.layer, tuple(bench_layers.LAYERS)) or LAYERS,
            formats=cli.checked("--weights", self.weights, list(run.FORMATS)) or run.DEFAULT_FORMATS,
            directions=cli.checked("--direction", self.direction, run.DIRECTIONS) or run.DIRECTIONS,
            rows=tuple(sorted(set(self.rows or ROWS))),
            routing=self.routing,
            seconds=self.seconds,
            rounds=self.rounds,
            limit=self.limit,
            scale=self.scale,
            device=self._device(),
            seed=self.seed,
            rank=RANK,
            interpreted=self.interpreted,
        )

    def _device(self) -> str:
        """The device. Interpreted kernels must be asked for, since their times mean nothing."""
        from executors._triton.device import INTERPRETED

        if self.interpreted and not INTERPRETED:
            cli.refuse("--interpreted: must go with TRITON_INTERPRET=1")
        if INTERPRETED and not self.interpreted:
            cli.refuse("TRITON_INTERPRET=1: must go with --interpreted, since times mean nothing then")
        otherwise = "crossover needs a GPU; TRITON_INTERPRET=1 and --interpreted go through it without one"
        return cli.check_gpu(self.device, INTERPRETED, otherwise)


@cli.with_options(CrossoverOptions)
def crossover(options: CrossoverOptions) -> None:
    """Measures up to how many rows fused decoding pays.

    Fused decoding decodes weights in 4 bits in the products; the other way is to decode them before the products. On
    layers of real models and for each format, grouped_nf4 is timed on each of its paths, and triton in bf16 on weights
    that were decoded before. All get the same inputs and are timed in turn, from a cold cache, for more and more rows
    per expert, forward and with adapters that are trained. Both ways must be right and agree before they are timed.
    Prints tables and the rule that loses least on this device, and writes crossover.json and crossover.png. Exit
    status: 0 if all were right, 1 if not, 2 for bad arguments.
    """
    plan, out = options.plan(), options.out
    from executors._crossover import report, run

    cli.make_folder(out)
    started = time.monotonic()

    def keep(curves: list[CrossoverCurve], left_out: list[str], complete: bool) -> None:
        seconds = time.monotonic() - started
        write_json(out / "crossover.json", report.as_json(plan, curves, left_out, complete, options.commit, seconds))

    with cli.progress_bar() as show:
        curves, left_out = run.run(plan, show, keep)
    _print(plan, curves, left_out)
    cli.print_written(out, ["crossover.json", *_plot(out, plan, curves)], started)
    if any(point.failure for curve in curves for point in curve.points):
        raise typer.Exit(1)


def _print(plan: CrossoverPlan, curves: list[CrossoverCurve], left_out: list[str]) -> None:
    from executors._crossover import report

    console = cli.new_console()
    console.print(escape("\n".join(report.heading(plan))))
    for curve in curves:
        console.print(escape(f"\n{report.title(curve)}"))
        console.print(report.table(curve, plan.interpreted))
        cli.print_lines([report.found(curve, plan.interpreted)])
    cli.print_lines([*left_out, *report.remarks(curves), "", *report.suggestion(plan, curves)])


def _plot(out: Path, plan: CrossoverPlan, curves: list[CrossoverCurve]) -> list[str]:
    """Writes the picture, and returns its name."""
    if not any(curve.points for curve in curves):
        return []
    from executors._crossover import plot  # matplotlib takes a second to import: only where it is needed

    plot.plot(out / "crossover.png", curves, plan)
    return ["crossover.png"]
