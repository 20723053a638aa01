"""Arguments that name files and where tensors go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from moe_ref.validation.arrays import short


def path_of(name: str, value: Any) -> Path:
    """The path.

    Raises:
        TypeError: it is no text and no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={short(value)}: must be text or a path")
    return Path(value)


def place_of(value: Any) -> torch.device:
    """The device, with its number.

    Raises:
        TypeError: it is none, and no name of one.
        ValueError: torch has no such device here, or it has no memory.
    """
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"device={short(value)}: must be a torch.device, or its name")
    try:
        place = torch.empty(0, device=value).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={value}: must be one that torch has here: {str(error).splitlines()[0]}") from None
    if place.type == "meta":
        raise ValueError(f"device={value}: must be one that has memory")
    return place
