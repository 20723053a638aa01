"""Checksums of the files of `save_quantized`, in their index: so no file is damaged, changed, or of another save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executors._files import checksums
from executors._files.tensors import header
from executors._files.text import read
from executors.checkpoint import BadCheckpoint
from executors.checkpoint.shards import INDEX

FILES = "checksums"  # in the index's metadata: {file: checksum}; of a safetensors file its header's, of INDEX its own


def add(folder: Path, index: dict[str, Any], names: list[str]) -> None:
    """Puts the checksums of the folder's files into the index, and that of the index itself."""
    index["metadata"][FILES] = {name: _of(folder / name) for name in names}
    index["metadata"][FILES][INDEX] = checksums.of_json(index)


def check(folder: Path, index: dict[str, Any]) -> None:
    """Compares the files with the index. One of an earlier version, which has no checksums, is not compared.

    Raises:
        BadCheckpoint: a file or the index differs, or a file is missing; one line says which.
    """
    if FILES not in index["metadata"]:
        return
    said = index["metadata"][FILES]
    if not isinstance(said, dict) or INDEX not in said or any(Path(n).name != n or "\0" in n for n in said):
        raise BadCheckpoint(f"{folder / INDEX}: metadata {FILES}={said!r:.200}: must be texts by file of this folder")
    rest = {name: value for name, value in said.items() if name != INDEX}
    plain = index | {"metadata": index["metadata"] | {FILES: rest}}
    for name, value in {**rest, INDEX: said[INDEX]}.items():
        try:
            own = checksums.of_json(plain) if name == INDEX else _of(folder / name)
        except FileNotFoundError:
            raise BadCheckpoint(f"{folder / name}: must be a file that exists, since {INDEX} names it") from None
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{folder / name}: cannot be read: {error}") from error
        if own != value:
            allowed = "as when it was written: the file is damaged or was changed; verify=False does not compare"
            raise BadCheckpoint(f"{folder / name} has checksum {own}: must be {value!r:.20}, {allowed}")


def _of(path: Path) -> str:
    return checksums.of_bytes(header(path) if path.suffix == ".safetensors" else read(path))
