"""Faults for what writes and reads files: processes that are killed, full disks, folders that cannot be written, races.

A fault happens in a child process: by the kernel where it can (a limit on file sizes kills, or refuses, at exactly one
byte, whoever writes), and by Python's audit hook before a file is opened, renamed or removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NOBODY = 65534
KILLED = 9
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")  # with "open" for writing and fsync
Action = Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """How a child ended: killed, or with what it said; an error is its classes and its text."""

    killed: bool
    said: Any = None
    error: tuple[str, ...] = ()
    text: str = ""


def in_a_child(action: Action, *prepare: Action) -> Outcome:
    """Runs the action in a child, after what prepares the fault there."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child uses none
        child = os.fork()
    if child == 0:
        _run(action, prepare, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    return Outcome(False, **json.loads(content)) if os.WIFEXITED(status) and content else Outcome(True)


def _run(action: Action, prepare: tuple[Action, ...], writing: int) -> None:
    found: dict[str, Any] = {}
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        for step in prepare:
            step()
        found = {"said": action()}
    except BaseException as error:
        found = {"error": [kind.__name__ for kind in type(error).__mro__], "text": str(error)}
    finally:
        os.write(writing, json.dumps(found, default=str).encode()[:60_000])
        os._exit(0)


def limited(size: int, *, kills: bool) -> Action:
    """No file grows beyond so many bytes: whoever tries is killed, or gets an error after what still fits."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


class AtEvent:
    """Counts changes of files below a folder, and kills or fails before the one with this number."""

    def __init__(self, root: Path, number: int | None = None, code: int | None = None) -> None:
        self.root, self.number, self.code, self.seen = str(root), number, code, 0

    def __call__(self) -> None:
        sys.addaudithook(self._heard)
        plain = os.fsync

        def fsync(descriptor: int) -> None:
            self._happens(os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else self.root)
            plain(descriptor)

        os.fsync = fsync

    def _heard(self, event: str, given: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and _writes(*given[1:3])):
            self._happens(given[0])

    def _happens(self, path: Any) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.root):
            return
        if self.seen == self.number:
            if self.code is None:
                os._exit(KILLED)
            self.seen += 1
            raise OSError(self.code, os.strerror(self.code), os.fspath(path))
        self.seen += 1


def _writes(mode: str | None, flags: int) -> bool:
    return bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def as_nobody() -> None:
    """What a folder's mode forbids holds for root too."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder into which everybody may look."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        yield Path(name).resolve()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be made, meanwhile."""
    before = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(before)


@contextmanager
def racing(*actions: Action) -> Iterator[Callable[[], bool]]:
    """Runs the actions side by side; yields whether one still runs. All have ended afterwards, none by a signal."""
    children = []
    for action in actions:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            children.append(os.fork())
        if children[-1] == 0:
            with contextlib.suppress(OSError):
                torch.set_num_threads(1)
                action()
                os._exit(0)
            os._exit(1)
    running = set(children)

    def still() -> bool:
        running.difference_update({child for child in running if os.waitpid(child, os.WNOHANG)[0]})
        return bool(running)

    try:
        yield still
    finally:
        for child in running:
            os.waitpid(child, 0)


FULL = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)
