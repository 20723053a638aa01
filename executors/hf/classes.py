"""Model classes: the one that a folder names, how it is made, and how loading ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from executors._files.text import one_line
from executors._protocol import Unsupported
from executors.checkpoint import BadCheckpoint
from executors.checkpoint.shards import read_json

ODD = (  # what transformers raises for entries that it does not understand
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, StrictDataclassError, TypeError, ValueError),
)


def class_of(folder: Path) -> tuple[type[nn.Module], Any]:
    """The class that config.json's architectures name, and the configuration.

    Raises:
        ValueError: there is no config.json of a known model, or transformers has no such class; BadCheckpoint where it
            is no JSON object.
    """
    if (folder / "config.json").exists():
        read_json(folder / "config.json")  # says what is wrong in one line, where transformers does not
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, *ODD) as error:
        raise ValueError(f"model={folder}: must have a config.json of a known model: {one_line(error)}") from error
    named = config.architectures if isinstance(config.architectures, list) else []
    found = [getattr(transformers, name, None) for name in named if isinstance(name, str)]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    kind: Any = next((kind for kind in kinds if kind.config_class and isinstance(config, kind.config_class)), None)
    if kind is None:
        allowed = f"must name a class of transformers for a {type(config).__name__}"
        raise ValueError(f"model={folder}: architectures={config.architectures}: {allowed}")
    return kind, config


def check_layers(folder: Path, config: Any, tensors: int) -> None:
    """Refuses more layers than a folder can have: making them would not end.

    Raises:
        BadCheckpoint: each has at least one of its tensors.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        allowed = f"must be at most {tensors}, as many as its tensors"
        raise BadCheckpoint(f"{folder / 'config.json'}: num_hidden_layers={layers}: {allowed}")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What modules are made in meanwhile, as from_pretrained makes them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def finish(model: Any, folder: Path) -> None:
    """Evaluation mode, and the folder's generation configuration."""
    path = folder / "generation_config.json"
    if model.can_generate() and path.is_file():
        read_json(path)
        with told_of(path):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.eval()


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Where transformers does not understand what a file or a folder says, one line that names it.

    Raises:
        BadCheckpoint: with the error of transformers.
        Unsupported: with the error of this package.
    """
    try:
        yield
    except (BadCheckpoint, torch.OutOfMemoryError):
        raise
    except Unsupported as error:
        raise Unsupported(f"{path}: {error}") from error
    except ODD as error:
        said = f"{type(error).__name__}: {one_line(error)}"
        raise BadCheckpoint(f"{path}: transformers cannot take it: {said}") from error
