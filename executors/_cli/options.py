"""What the commands share: arguments checked, refusals in one line, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from executors._compare import run as comparison

SHOW_AFTER_S = 2.0
WIDTH = 80
LARGEST_SEED = 2**63 - 1

DeviceOption = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]


def within(least: float, most: float = math.inf) -> Callable[..., Any]:
    """A callback for an option with a number, or several: what is outside is refused in one line."""
    allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and not least <= number <= most:
                refuse(f"{max(parameter.opts, key=len)} {number}: must be {allowed}")
        return value

    return check


def make_folder(out: Path) -> None:
    """Before the work, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {out}: must be a folder that can be written: {error.strerror}")


def chosen_names(chosen: list[str] | None) -> list[str]:
    """The executors asked for with --executor, or all but auto."""
    known = comparison.everyone()
    for name in chosen or []:
        if name not in known:
            refuse(f"--executor {name}: must be one of {', '.join(known)}")
    return list(dict.fromkeys(chosen)) if chosen else known


def choice(option: str, chosen: list[str] | None, known: Sequence[str]) -> tuple[str, ...] | None:
    """What was chosen, each once, or None where nothing was."""
    for name in chosen or []:
        if name not in known:
            refuse(f"{option} {name}: must be one of {', '.join(known)}")
    return tuple(dict.fromkeys(chosen)) if chosen else None


def check_device(device: str) -> None:
    """Refuses a device that torch does not have."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        refuse(f"--device {device}: must be a device that torch has here: {str(error).splitlines()[0]}")


def refuse(message: str) -> NoReturn:
    """One line, and exit status 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def new_console() -> Console:
    """As wide as a terminal is at least."""
    return Console(width=WIDTH, soft_wrap=False, highlight=False)


@contextmanager
def progress_bar() -> Iterator:  # type: ignore[type-arg]
    """A progress bar on stderr, shown only on a terminal, and only once the work has taken two seconds."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
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
