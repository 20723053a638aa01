"""Text that comes from files: JSON that means one thing, and messages of one line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

LONGEST = 1000  # characters of a message that quotes a file


def one_line(said: object) -> str:
    """Anything as one line that a terminal can print: an error of another library, or names that a file chose."""
    text = " ".join(str(said).split())
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def read(path: Path) -> bytes:
    """What a file holds.

    Raises:
        OSError: there is none, it cannot be read, or it is a pipe or a device, which may never end.
    """
    check_regular(path)
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Raises OSError for a pipe or a device, which may never end. What is missing, or a folder, fails by itself."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text that means the same to every reader.

    Args:
        text: as text, or as bytes in UTF-8.
        finite: whether NaN and Infinity, which JSON does not have, are refused; config.json of some models has them.

    Raises:
        ValueError: it is no JSON, an object has a key twice, it is nested thousands deep, or it has half a surrogate;
            in one line.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number if finite else None)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    half = b"\\ud" in text.lower() if isinstance(text, bytes) else "\\ud" in text.lower()
    if half:
        json.dumps(found, ensure_ascii=False).encode()  # raises: half a surrogate is no text
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r:.60} is there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
