"""Progress reports of long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Progress = Callable[[int, int], object] | Literal[True] | None


def check_progress(progress: Any) -> None:
    """Checks the argument ``progress`` of a public call.

    Raises:
        TypeError: it is neither None, nor True, nor callable.
    """
    if progress is not None and progress is not True and not callable(progress):
        raise TypeError(f"progress={progress!r:.60}: must be None, True, or a callable (done, total)")


@contextmanager
def reporter(progress: Progress, total: int) -> Iterator[Callable[[int], object]]:
    """Yields a function that reports how much is done, to the callable or to a bar on stderr.

    Raises:
        ModuleNotFoundError: a bar is asked for, and rich is missing.
    """
    if progress is None:
        yield lambda done: None
    elif progress is True:
        with _bar(total) as show:
            yield show
    else:
        say = progress
        yield lambda done: say(done, total)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        allowed = "pip install rich, or pass a callable (done, total)"
        raise ModuleNotFoundError(f"progress=True: a bar needs rich: {allowed}") from None
    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("quantising", total=total)
        yield lambda done: bar.update(task, completed=done)
