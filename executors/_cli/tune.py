"""The command that searches for faster tiles of the Triton kernels on this machine, and stores its choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape

from executors._bench.layers import LAYERS, Shape
from executors._bench.routing import KINDS
from executors._bench.settings import DIRECTIONS
from executors._cli import options as cli
from executors._compare import report
from executors._files.whole import write_json
from moe_ref.types import GATED, MoEConfig

if TYPE_CHECKING:
    from executors._tune.choice import Choice
    from executors._tune.run import TuneSettings

SCHEMA = 1
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("concatenated", "interleaved")
DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class TuneOptions:
    """What can be asked of a search."""

    layer: Annotated[str | None, typer.Option(metavar="NAME", help=f"A model's layer: {', '.join(LAYERS)}.")] = None
    experts: Annotated[int | None, typer.Option(callback=cli.within(1), help="E, of a layer without a name.")] = None
    top_k: Annotated[int | None, typer.Option(callback=cli.within(1), help="K.")] = None
    hidden: Annotated[int | None, typer.Option(callback=cli.within(1), help="H.")] = None
    intermediate: Annotated[int | None, typer.Option(callback=cli.within(1), help="I.")] = None
    activation: Annotated[str, typer.Option(help=f"{', '.join(GATED)}.")] = "swiglu"
    layout: Annotated[str, typer.Option(help="Of gate and up: concatenated or interleaved.")] = "concatenated"
    transposed: Annotated[bool, typer.Option("--transposed", help="Stored as (E, H, 2I) and (E, I, H).")] = False
    rank: Annotated[int, typer.Option(callback=cli.within(0), help="Of adapters beside frozen weights; 0: none.")] = 0
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16"
    direction: Annotated[str, typer.Option(help="forward or forward_backward.")] = "forward_backward"
    tokens: Annotated[list[int] | None, typer.Option(callback=cli.within(1), help="T; repeatable. Default: 4096.")] = (
        None
    )
    routing: Annotated[str, typer.Option(help="real, uniform or skewed.")] = "real"
    seconds: Annotated[float, typer.Option(callback=cli.within(0), help="Of the search, for all T together.")] = 120.0
    file: Annotated[Path | None, typer.Option(help="Store the choice there; default: where tuned=True looks.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Store nothing.")] = False
    json: cli.JsonOption = None
    device: cli.GpuOption = None
    seed: cli.SeedOption = 0

    def settings(self) -> TuneSettings:
        """The settings, checked."""
        device, shape = self._device(), self._shape()
        from executors._tune.run import TuneSettings

        cli.checked("--dtype", [self.dtype], DTYPES)
        cli.checked("--direction", [self.direction], DIRECTIONS)
        cli.checked("--routing", [self.routing], KINDS)
        return TuneSettings(
            shape=shape,
            dtype=self.dtype,
            direction=self.direction,
            tokens=self._tokens(shape),
            routing=self.routing,
            seconds=self.seconds,
            device=device,
            seed=self.seed,
            rank=self.rank,
        )

    def _device(self) -> str:
        with cli.needing_triton("tune needs"):
            from executors._triton import interpreter
            from executors._triton.device import INTERPRETED
        if INTERPRETED:
            interpreter.mend()
        otherwise = "tune needs a GPU; TRITON_INTERPRET=1 goes through it without one, and its choice means nothing"
        return cli.check_gpu(self.device, INTERPRETED, otherwise)

    def _shape(self) -> Shape:
        sizes = (self.experts, self.top_k, self.hidden, self.intermediate)
        options = ("--experts", "--top-k", "--hidden", "--intermediate")
        given = dict(zip(options, sizes, strict=True))
        if self.layer is not None:
            for option, value in given.items():
                if value is not None:
                    cli.refuse(f"{option} {value}: must be left out with --layer {self.layer}")
            for other in fields(self):
                chosen = getattr(self, other.name)
                if other.name in ("activation", "layout", "transposed") and chosen != other.default:
                    shown = "" if chosen is True else f" {chosen}"
                    cli.refuse(f"--{other.name}{shown}: must be left out with --layer {self.layer}")
            cli.checked("--layer", [self.layer], list(LAYERS))
            return LAYERS[self.layer]
        missing = [option for option, value in given.items() if value is None]
        if missing:
            cli.refuse(f"{missing[0]}: must be given, as {', '.join(options)}, or --layer NAME instead of them")
        cli.checked("--activation", [self.activation], GATED)
        cli.checked("--layout", [self.layout], LAYOUTS)
        experts, top_k, hidden, intermediate = (value or 0 for value in sizes)
        if top_k > experts:
            cli.refuse(f"--top-k {top_k}: must be at most --experts {experts}")
        config = MoEConfig(top_k, activation=self.activation, gate_up_layout=self.layout)  # type: ignore[arg-type]
        return Shape("unnamed", experts, hidden, intermediate, config, transposed=self.transposed)

    def _tokens(self, shape: Shape) -> tuple[int, ...]:
        """Each T once; refuses two T of which one choice would replace the other."""
        from executors._triton.tuned import bucket_of

        seen: dict[int, int] = {}
        for count in dict.fromkeys(self.tokens or [DEFAULT_TOKENS]):
            bucket = bucket_of(count * shape.top_k, shape.experts)
            if bucket in seen:
                cli.refuse(f"--tokens {count}: must be left out, as one choice serves it and --tokens {seen[bucket]}")
            seen[bucket] = count
        return tuple(seen.values())


@cli.with_options(TuneOptions)
def tune(options: TuneOptions) -> None:
    """Searches for faster tiles of the Triton kernels.

    The search is for this GPU, a layer and numbers of tokens. Each product starts from the tile that ships with this
    package. Every tile tried must give the same results but for rounding, and win by more than noise; in the end so
    must all of them on the whole layer. The choice is stored, and only executors.get("triton", tuned=True) uses it.
    Ctrl-C ends the search and keeps what it has found. Exit status: 0, 1 if the choice cannot be stored, 2 for bad
    arguments.
    """
    settings = options.settings()
    choices, stored = [], True
    for choice in _choices(settings):
        choices.append(choice)
        if choice.changed and not options.dry_run:
            stored = _store(options.file, choice) and stored
    if options.json is not None:
        _write_json(options.json, settings, choices)
    if not stored:
        raise typer.Exit(1)


def _choices(settings: TuneSettings) -> Iterator[Choice]:
    """Searches for each T under a bar that shows the time left, and prints what was found."""
    from executors._triton.tuned import device_name
    from executors._tune import choice as tune_choice
    from executors._tune import run

    console, device = cli.new_console(), device_name(torch.device(settings.device))
    console.print(escape(f"{settings.shape}, {settings.dtype}, {settings.direction}, {device}"))
    with cli.progress_bar() as show:
        layer = run.draw(settings, show)
    for tokens in settings.tokens:
        try:
            with cli.progress_bar() as show:
                choice = run.search(settings, layer, tokens, show)
        except run.SearchFailed as error:
            cli.refuse(str(error))
        console.print(f"\n{escape(tune_choice.heading(choice))}")
        console.print(tune_choice.table(choice))
        if not choice.changed:
            console.print("no tiles are faster on the whole layer than those that ship: nothing to store")
        yield choice
        if choice.interrupted:
            return


def _store(file: Path | None, choice: Choice) -> bool:
    """Stores a choice and says where; or says why not, and prints it instead."""
    from executors._triton import tuned, tuned_file
    from executors._tune.choice import figures

    path = file or tuned.default_path()
    try:
        aside = tuned_file.save(path, choice.key, choice.chosen, figures(choice))
    except OSError as error:
        cli.print_lines([json.dumps(tuned_file.as_entry(choice.key, choice.chosen, figures(choice)))])
        typer.echo(f"error: {path}: cannot be written: {error.strerror}; the choice is printed above", err=True)
        return False
    if aside is not None:
        cli.print_lines([f"{path} could not be understood; its content was moved to {aside}"])
    use = 'used by executors.get("triton", tuned=True)'
    if path != tuned.default_path():
        use += f" from {tuned.default_path()} only"
    cli.print_lines([f"stored in {path}; {use}"])
    return True


def _write_json(path: Path, settings: TuneSettings, choices: list[Choice]) -> None:
    from executors._tune.choice import as_json

    content = {"schema": SCHEMA, "machine": report.machine(), "arguments": settings.as_json()}
    write_json(path, content | {"choices": [as_json(choice) for choice in choices]})
    cli.print_lines([f"wrote {path}"])
