"""The part of ``kernels`` that executes a layer's kernels on the CPU and counts what they ask of a GPU's units."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from executors._bench.layers import LAYERS, Shape
from executors._cli import options as cli
from executors._files.whole import write_json
from executors.layer_file import bundled_layer, load_layer

if TYPE_CHECKING:
    from executors._counts.run import CountPlan

BUNDLED = "bundled"
DIRECTIONS = ("forward", "forward_backward")
DTYPES = ("bfloat16", "float16", "float32")
TOKENS = 128


def execute(layer: str, tokens: int, dtype: str, packed: str | None, direction: str, card: str,
            json: Path | None, plot: Path | None) -> None:  # fmt: skip
    """Counts one call, prints a table, and writes what was asked for."""
    plan = plan_of(layer, tokens, dtype, packed, direction, card)
    from executors._counts import report
    from executors._counts.run import count_layer

    with cli.progress_bar() as show:
        found = count_layer(plan, show)
    console = cli.new_console()
    cli.print_lines(report.heading(found))
    console.print(report.table(found))
    console.print(report.notes(), style="dim")
    cli.print_lines(report.losses(found))
    written = []
    if json is not None:
        write_json(json, report.as_json(found))
        written.append(json)
    if plot is not None:
        from executors._counts import plot as picture

        picture.plot(plot, found, picture.title_of(found))
        written.append(plot)
    cli.print_lines([f"wrote {path}" for path in written])


def plan_of(layer: str, tokens: int, dtype: str, packed: str | None, direction: str, card: str) -> CountPlan:
    """The plan, checked."""
    with cli.needing_triton("kernels need"):
        from executors._counts.cards import CARDS
        from executors._counts.run import MOST_ROWS, CountPlan
        from executors._counts.slices import FORMATS
        from executors._triton.device import INTERPRETED
    if INTERPRETED:
        cli.refuse("TRITON_INTERPRET=1: must be unset to compile and execute kernels")
    cli.checked("--execute", [layer], (*LAYERS, BUNDLED))
    cli.checked("--dtype", [dtype], DTYPES)
    cli.checked("--packed", [packed] if packed else None, list(FORMATS))
    cli.checked("--direction", [direction], DIRECTIONS)
    cli.checked("--card", [card], list(CARDS))
    shape = _bundled() if layer == BUNDLED else LAYERS[layer]
    plan = CountPlan(shape, tokens, getattr(torch, dtype), packed or "", direction != "forward", CARDS[card])
    if plan.rows > MOST_ROWS:
        most = MOST_ROWS * shape.experts // shape.top_k
        _refuse_tokens(tokens, f"at most {most} for {layer}, {MOST_ROWS} rows of an expert")
    if plan.backward and plan.active < shape.experts:
        _refuse_tokens(tokens, f"at least {-(-shape.experts // shape.top_k)} for {layer} with backward")
    return plan


def _refuse_tokens(tokens: int, allowed: str) -> NoReturn:
    cli.refuse(f"--tokens {tokens}: must be {allowed}")


def _bundled() -> Shape:
    weights = load_layer(bundled_layer()).weights
    experts, hidden, intermediate = weights.down_proj.shape
    assert weights.config is not None
    return Shape(BUNDLED, experts, hidden, intermediate, weights.config, biases=True, transposed=True)
