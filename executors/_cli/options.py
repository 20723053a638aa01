"""Options that commands share, checks of arguments, refusals in one line, and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from executors._compare import run as comparison
from executors._compare.judge import with_clear_choice
from executors._registry import ELSEWHERE
from executors.layer_file import BadLayerFile, Layer, bundled_layer, first_tokens, load_layer

SHOW_AFTER_S = 2.0
WIDTH = 80
LARGEST_SEED = 2**63 - 1

Options = TypeVar("Options")


def with_options(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Makes a command whose options are the fields of a dataclass, from a function of that dataclass."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**given: Any) -> None:
            function(kind(**given))

        hints = get_type_hints(kind, include_extras=True)
        known = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(kind)  # type: ignore[arg-type]
        ]
        command.__signature__ = Signature(known)  # type: ignore[attr-defined]
        command.__annotations__ = hints
        return command

    return decorate


def within(least: float, most: float = math.inf) -> Callable[..., Any]:
    """A callback that checks the range of an option with a number, or with several."""
    allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and not least <= number <= most:
                refuse(f"{max(parameter.opts, key=len)} {number}: must be {allowed}")
        return value

    return check


check_seed = within(0, LARGEST_SEED)


def in_a_folder(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """A callback that checks an option with a file to write."""
    if path is not None and not path.parent.is_dir():
        refuse(f"{max(parameter.opts, key=len)} {path}: must be in a folder that exists")
    return path


DeviceOption = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]
GpuOption = Annotated[str | None, typer.Option(help="Which GPU, such as cuda:1.")]
InterpretedOption = Annotated[
    bool, typer.Option("--interpreted", help="Run interpreted kernels; their times are no measurement.")
]
JsonOption = Annotated[
    Path | None, typer.Option(metavar="FILE", callback=in_a_folder, help="Write all figures there too.")
]
PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", callback=in_a_folder, help="Write a picture there.")]
LimitOption = Annotated[
    float | None, typer.Option(callback=within(0), metavar="SECONDS", help="Begin nothing more after so many seconds.")
]
RoundsOption = Annotated[int, typer.Option(callback=within(1), help="Least number of timed rounds.")]
ScaleOption = Annotated[int, typer.Option(callback=within(1), help="Divides H and I, for a quick look.")]
RepeatsOption = Annotated[int, typer.Option(callback=within(1), help="Timed calls of each executor.")]
TokensOption = Annotated[int | None, typer.Option(callback=within(1), help="Only the layer's first N tokens.")]
SamplesSeedOption = Annotated[
    int, typer.Option(callback=check_seed, help="Seed of the upstream gradient and of the samples.")
]
SeedOption = Annotated[int, typer.Option(callback=check_seed, help="Seed of weights and inputs.")]
FileArgument = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="A layer file (docs/layer-file.md); default: the bundled layer.")
]


def make_folder(out: Path) -> None:
    """Makes the folder of the results before they are measured."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {out}: must be a folder that can be written: {error.strerror}")


def chosen_names(chosen: list[str] | None) -> list[str]:
    """The executors asked for with --executor, or all but auto."""
    known = comparison.everyone()
    hint = f"; {ELSEWHERE}: report --results takes what they write"
    return list(checked("--executor", chosen, known, hint) or known)


def checked(option: str, chosen: list[str] | None, known: Sequence[str], hint: str = "") -> tuple[str, ...] | None:
    """What was chosen, each once, or None where nothing was; ``hint`` ends the refusal."""
    for name in chosen or []:
        if name not in known:
            refuse(f"{option} {name}: must be one of {', '.join(known)}{hint}")
    return tuple(dict.fromkeys(chosen)) if chosen else None


def check_device(device: str) -> None:
    """Refuses a device that torch does not have."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        refuse(f"--device {device}: must be a device that torch has here: {str(error).splitlines()[0]}")


def check_gpu(device: str | None, interpreted: bool, otherwise: str) -> str:
    """The GPU for a command that measures Triton's kernels, or the CPU where they are interpreted.

    Args:
        device: as asked for.
        interpreted: whether the kernels are.
        otherwise: the refusal where there is no GPU.
    """
    if not interpreted and not torch.cuda.is_available():
        refuse(otherwise)
    found = device or ("cpu" if interpreted else "cuda")
    check_device(found)
    if not interpreted and torch.device(found).type != "cuda":
        refuse(f"--device {found}: must be a GPU")
    return found


@contextmanager
def needing_triton(what: str) -> Iterator[None]:
    """Refuses where an import finds no Triton; ``what`` begins the message."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        refuse(f'{what} triton: pip install "moe-ref[triton]"')


def load(file: Path | None, device: str) -> Layer:
    """The layer of a file, or the bundled one."""
    check_device(device)
    try:
        return load_layer(file or bundled_layer(), device)
    except BadLayerFile as error:
        refuse(str(error))


def load_clear(file: Path | None, device: str, tokens: int | None) -> tuple[Layer, int]:
    """The layer of a file, or the bundled one, that executors can be judged on, and how many tokens that leaves out.

    Args:
        file: of the layer.
        device: where.
        tokens: only so many of the first, or None.
    """
    given = first_tokens(load(file, device), tokens)
    layer = with_clear_choice(given)
    if not len(layer.x):
        refuse("router_logits: must have a token for which only one choice of experts is right")
    return layer, len(given.x) - len(layer.x)


def refuse(message: str) -> NoReturn:
    """Prints one line, and ends with exit status 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def fail(message: str) -> NoReturn:
    """Prints one line, and ends with exit status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def new_console() -> Console:
    """A console of 80 columns."""
    return Console(width=WIDTH, soft_wrap=False, highlight=False)


def print_lines(lines: Sequence[str]) -> None:
    """Prints lines as they are, however long."""
    console = new_console()
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def print_written(out: Path, names: Sequence[str], started: float) -> None:
    """Says which files were written to a folder, and how long it all took since ``started``."""
    print_lines([f"wrote {', '.join(names)} to {out} ({time.monotonic() - started:.0f} s)"])


@contextmanager
def progress_bar() -> Iterator:  # type: ignore[type-arg]
    """A progress bar on stderr, shown only on a terminal, and only once the work has taken two seconds."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    )
    task = bar.add_task("", total=None)
    started = time.monotonic()

    def show(text: str, done: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - started > SHOW_AFTER_S and bar.console.is_terminal:
            bar.start()
        bar.update(task, description=text, completed=done, total=total or None)

    try:
        yield show
    finally:
        if bar.live.is_started:  # stopping prints an empty line
            bar.stop()
