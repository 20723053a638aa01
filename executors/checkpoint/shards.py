"""The files of a checkpoint: which file holds which key, and one tensor at a time. Nothing here knows of layers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from executors._files import tensors
from executors._files.tensors import TensorFile
from executors._files.text import parse_json, read
from executors.checkpoint.errors import BadCheckpoint, short

INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Shards:
    """Safetensors files that lie in one folder; opening them reads their headers only.

    Attributes:
        folder: where they lie.
        verify: whether checksums are compared, where a file has them.
        where: the file of each key.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        if not folder.is_dir():
            raise BadCheckpoint(f"{folder}: must be a folder with config.json and .safetensors files")
        self.folder, self.verify = folder, verify
        self.where = _indexed(folder) if (folder / INDEX).exists() else _listed(folder, verify)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """A reader that keeps each file open until it is done."""
        with ExitStack() as stack:
            yield Reader(self, stack)


class Reader:
    """Reads tensors by key, each file opened once."""

    def __init__(self, shards: Shards, stack: ExitStack) -> None:
        self.shards = shards
        self._stack = stack
        self._files: dict[Path, TensorFile] = {}

    def file_of(self, key: str) -> Path:
        """The file that holds a key.

        Raises:
            BadCheckpoint: none does.
        """
        if key not in self.shards.where:
            raise BadCheckpoint(
                f"{self.shards.folder}: {key} is missing: must be there, with the layer's other tensors"
            )
        return self.shards.where[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return self._file(key).shape(key)

    def dtype(self, key: str) -> str:
        """The dtype of a tensor in the format's own words, such as "BF16", from the header alone."""
        return self._file(key).dtype(key)

    def tensor(self, key: str) -> Tensor:
        """The tensor, on the CPU."""
        return self._file(key).tensor(key)

    def _file(self, key: str) -> TensorFile:
        path = self.file_of(key)
        if path not in self._files:
            file = tensors.opened(path, BadCheckpoint, verify=self.shards.verify)
            self._files[path] = self._stack.enter_context(file)
        if key not in self._files[path].names:
            raise BadCheckpoint(f"{path}: {key} is missing: must be there, since {INDEX} names this file")
        return self._files[path]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadCheckpoint: there is no such file, or it holds something else.
    """
    try:
        found = parse_json(read(path), finite=False)
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: must be a file that exists") from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: must be JSON, but {error}") from None
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{path} holds {short(found)}: must be a JSON object")
    return found


def _indexed(folder: Path) -> dict[str, Path]:
    """Keys and files as the index has them; every file must be there."""
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BadCheckpoint(f"{folder / INDEX}: weight_map={short(names)}: must be an object from keys to file names")
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            said = short(name)
            raise BadCheckpoint(f"{folder / INDEX} names {said}: must be a .safetensors file in the same folder")
        if not os.path.isfile(folder / name):  # also where the name is none: too long, half a surrogate
            raise BadCheckpoint(f"{folder / name}: must be a file that exists, since {INDEX} names it")
    return {key: folder / name for key, name in names.items()}


def _listed(folder: Path, verify: bool) -> dict[str, Path]:
    """Keys and files where there is no index: of every .safetensors file, each key once."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        reason = f", and {pickled[0]} is never opened, since unpickling runs code" if pickled else ""
        raise BadCheckpoint(f"{folder} has no .safetensors file: must have one{reason}")
    where: dict[str, Path] = {}
    for path in paths:
        with tensors.opened(path, BadCheckpoint, verify=verify) as file:
            for key in sorted(file.names):
                if key in where:
                    allowed = f"must be in one file, or {INDEX} must say in which"
                    raise BadCheckpoint(f"{path}: {key} is also in {where[key].name}: {allowed}")
                where[key] = path
    return where
