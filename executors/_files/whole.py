"""Files that are written whole or not at all: everything this project writes goes through `replacing`.

Standard library only: benchmarks/gpu.py takes this file before anything is installed.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file, which takes the place of ``path`` unless an error comes first.

    A process that is killed leaves the old file, and perhaps ".NAME.*.tmp" beside it. The content reaches the disk
    before the name does, so that a machine that stops leaves no half file either. Of several writers the last one wins.

    Raises:
        OSError: it cannot be written; one line names ``path`` and the reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def cannot_write(path: Path, error: OSError) -> OSError:
    """The same kind of error in one line that names the file which was asked for, not the temporary one."""
    return error if error.errno is None else OSError(error.errno, error.strerror, os.fspath(path))


def sync(path: Path) -> None:
    """Returns when the file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file, with null for NaN and infinity: JSON has neither.

    Raises:
        OSError: as `replacing`.
    """
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Keeps out whoever locks the same path, until the end. Its file ".NAME.lock" is there meanwhile.

    A process that is killed locks no more, whether or not its file stays. Windows has no such lock: there nobody is
    kept out.

    Args:
        path: of what is written; its folder must be there.
        wait: for the other; otherwise raise.

    Raises:
        OSError: it cannot be locked; without ``wait`` BlockingIOError where another has it; in one line.
    """
    if sys.platform == "win32":
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = _acquired(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, "must not be written by another process meanwhile", os.fspath(path)
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # a file that stays locks nobody out
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(lock: Path, how: int) -> int:
    """A descriptor of the locked file. Whoever had it before has removed it: then the one that is there now counts."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, how)
            if _is(lock, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
