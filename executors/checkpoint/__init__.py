"""Checkpoints as they lie on disk: one Mixture-of-Experts layer at a time (docs/checkpoints.md).

`open` takes a folder of safetensors files with config.json. Names decide how a layer is stored, and shapes are checked;
what the gate computes, how experts are chosen, and in which order stacks are stored, is fixed by a table of families.
Nothing is guessed, and nothing is unpickled. It needs torch and safetensors, and no library of models.
"""

from __future__ import annotations

import os

from executors._files.arguments import path_of
from executors.checkpoint.errors import BadCheckpoint
from executors.checkpoint.reader import Checkpoint, CheckpointLayer, Router
from executors.checkpoint.table import FAMILIES, REFUSED
from moe_ref.validation.arrays import short

__all__ = ["BadCheckpoint", "Checkpoint", "CheckpointLayer", "Router", "families", "open", "refused"]


def open(path: str | os.PathLike[str], family: str | None = None) -> Checkpoint:  # noqa: A001  (checkpoint.open)
    """Opens a checkpoint; only headers and config.json are read.

    Args:
        path: a folder of safetensors files, with or without an index, and config.json.
        family: one of `families`, where config.json's model_type is in no table; it is not looked at then.

    Raises:
        BadCheckpoint: it cannot be read; one line says the file, the key, what is there, and what is allowed.
        TypeError: the path or the family is no text.
    """
    folder = path_of("path", path)
    if family is not None and not isinstance(family, str):
        raise TypeError(f"family={short(family)}: must be text, or None")
    return Checkpoint(folder, family)


def families() -> list[str]:
    """The families that are understood, by config.json's model_type."""
    return sorted(FAMILIES)


def refused() -> dict[str, str]:
    """The families that are refused by name, and why."""
    return dict(REFUSED)
