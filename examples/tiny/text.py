"""The text of Python's documentation topics, of which the bundled model has read all but the last tenth."""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics

import torch
from torch import Tensor

UNREAD = 0.1  # the end of the text, which the model has not been trained on


def whole_text() -> bytes:
    """All topics in the order of their sorted names. It belongs to the version of Python."""
    return "".join(topics[name] for name in sorted(topics)).encode()


def sha256() -> str:
    """Of the text."""
    return hashlib.sha256(whole_text()).hexdigest()


def unread_windows(count: int, context: int) -> Tensor:
    """[count, context + 1] bytes from where the model's training text ended; each begins where the last one ends.

    The first 1024 bytes are those whose hidden states are bundled with the layer.

    Raises:
        ValueError: the unread text is shorter than that.
    """
    text = whole_text()
    unread = text[len(text) - int(len(text) * UNREAD) :]
    if count * context >= len(unread):
        raise ValueError(f"{count} windows of {context} bytes: must be fewer than {len(unread)} bytes in all")
    values = torch.frombuffer(bytearray(unread), dtype=torch.uint8).long()
    return values[: count * context + 1].unfold(0, context + 1, context)
