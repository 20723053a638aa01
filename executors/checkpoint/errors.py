"""What is raised where a checkpoint cannot be read exactly."""

from __future__ import annotations

from typing import Any

from executors._files.text import one_line


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read; the message is one line: file, key, what is there, what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def short(value: Any) -> str:
    """A value from a file, on one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
