"""``bench --model``: a whole MoE block of a transformers model, on every way to run its experts."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from executors._bench.measure import spread
from executors._bench.report import commit
from executors._bench.table import DIRECTIONS
from executors._cli import options as cli
from executors._files.whole import write_json

if TYPE_CHECKING:
    from executors._bench.block import Block, BlockRow

SCHEMA = 1
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class ModelSettings:
    """What is measured.

    Attributes:
        model: a model class of transformers, or a folder with a config.json.
        changes: of its configuration, as NAME=NUMBER.
        tokens: T, each.
        directions: "forward", "forward_backward".
        names: of executors.
        seconds: how long a case is timed.
        device: where.
        seed: of weights and inputs.
    """

    model: str
    changes: tuple[str, ...]
    tokens: tuple[int, ...]
    directions: tuple[str, ...]
    names: tuple[str, ...]
    seconds: float
    device: str
    seed: int


def bench_model(settings: ModelSettings, out: Path) -> list[BlockRow]:
    """Measures, prints tables, and writes bench-model.json; returns all rows."""
    try:
        from executors._bench import block as benchmark
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        cli.refuse('--model needs transformers: pip install "moe-ref[hf]"')
    cli.make_folder(out)
    started = time.monotonic()
    try:
        block = benchmark.make_block(settings.model, _changes(settings), settings.device, DTYPE, settings.seed)
        found = _measured(settings, block)
    except ValueError as error:
        cli.refuse(f"--model {error}".replace("--model model=", "--model "))
    console = cli.new_console()
    text = f"{block.kind}: {block.layer}, bfloat16, torch {torch.__version__}, {torch.get_num_threads()} threads"
    console.print(escape(text))
    for direction in settings.directions:
        console.print(f"\n{DIRECTIONS[direction]} of the whole block; times as fast as the fastest hf: way")
        console.print(_table([(tokens, rows) for tokens, way, rows in found if way == direction]))
    for line in dict.fromkeys(f"{row.name}: {row.reason}" for _, _, rows in found for row in rows if row.reason):
        console.print(escape(line))
    content = {
        "schema": SCHEMA,
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "block": block.kind,
        "experts": block.layer,
        "arguments": asdict(settings),
        "cases": [{"T": t, "direction": way, "rows": [asdict(row) for row in rows]} for t, way, rows in found],
    }
    write_json(out / "bench-model.json", content)
    cli.print_written(out, ["bench-model.json"], started)
    return [row for _, _, rows in found for row in rows]


def _measured(settings: ModelSettings, block: Block) -> list[tuple[int, str, list[BlockRow]]]:
    from executors._bench import block as benchmark

    cases = [(tokens, way) for way in settings.directions for tokens in settings.tokens]
    found = []
    with cli.progress_bar() as show:
        for number, (tokens, way) in enumerate(cases):

            def tell(text: str, number: int = number) -> None:
                show(text, number, len(cases))

            rows = benchmark.measure_block(
                block, tokens, way, list(settings.names), settings.seconds, settings.seed, tell
            )
            found.append((tokens, way, rows))
    return found


def _table(cases: list[tuple[int, list[BlockRow]]]) -> Table:
    from executors._bench.block import ratio

    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    out.add_column("T", justify="right", no_wrap=True)
    out.add_column("experts on", no_wrap=True)
    for name in ("error", "ms", "times as fast"):
        out.add_column(name, justify="right", no_wrap=True)
    for tokens, rows in cases:
        for number, row in enumerate(rows):
            times = ratio(row, rows)
            out.add_row(
                str(tokens) if number == 0 else "",
                row.name,
                "[red]WRONG[/red] " * row.failed + ("" if row.error is None else f"{row.error:.1e}"),
                f"{1000 * spread(row.seconds).median:.3g}" if row.seconds else "",
                "" if times is None else f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})",
            )
        out.add_section()
    return out


def _changes(settings: ModelSettings) -> dict[str, Any]:
    """The changes of the configuration, by name."""
    found: dict[str, Any] = {}
    for text in settings.changes:
        name, _, value = text.partition("=")
        if not name or not value.isdecimal() or not int(value):
            cli.refuse(f"--set {text}: must be NAME=NUMBER of at least 1, such as num_local_experts=8")
        found[name] = int(value)
    return found
