"""Model classes: the one that a folder names, how it is made, and how loading ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from executors._files.text import one_line
from executors.checkpoint.shards import read_json


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
    except (OSError, ValueError) as error:
        raise ValueError(f"model={folder}: must have a config.json of a known model: {one_line(error)}") from error
    named = config.architectures if isinstance(config.architectures, list) else []
    found = [getattr(transformers, name, None) for name in named if isinstance(name, str)]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    kind: Any = next((kind for kind in kinds if kind.config_class and isinstance(config, kind.config_class)), None)
    if kind is None:
        allowed = f"must name a class of transformers for a {type(config).__name__}"
        raise ValueError(f"model={folder}: architectures={config.architectures}: {allowed}")
    return kind, config


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
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.eval()
