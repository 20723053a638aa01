"""Safetensors files: written whole with checksums, and read with every error in one line that names the file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from executors._files import checksums
from executors._files.checksums import Checksums
from executors._files.text import check_regular, one_line, parse_json
from executors._files.whole import replacing
from moe_ref.validation.arrays import short

LARGEST_SIZE = 2**63 - 1  # of a dimension, in torch
TRIES = 100


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with checksums, whole or not at all.

    Raises:
        OSError: it cannot be written; in one line that names the file.
        ValueError: a tensor has no numbers.
        TypeError: metadata that is no text.
    """
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"{key}={short(value)}: must be text")
    plain = _apart(tensors)
    said = checksums.described(plain, metadata)
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, said)
        except SafetensorError as error:
            raise _os_error(path, error) from error


class TensorFile:
    """An open safetensors file. Every error is of the class that its reader raises, in one line with the file's name.

    Attributes:
        path: the file.
        metadata: its metadata, which may be empty.
        names: of its tensors.
    """

    def __init__(self, path: Path, file: Any, refuse: type[ValueError], verify: bool) -> None:
        self.path, self._file, self._refuse = path, file, refuse
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names = set(file.keys())
        self._checksums = Checksums(None)
        try:
            _check_header(header(path))
            if verify:
                self._checksums = Checksums.read(self.metadata, self.names)
        except (ValueError, OSError) as error:
            raise self._error(error) from error

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, a view of the file, compared with its checksum where the file has them."""
        try:
            value: Tensor = self._file.get_tensor(name)
            self._checksums.check(name, value)
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:
            raise self._error(f"{name} cannot be read: {one_line(error)}") from error
        except ValueError as error:
            raise self._error(error) from error
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor in the format's own words, such as "BF16", from the header alone."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        try:
            return self._file.get_slice(name)
        except SafetensorError as error:
            raise self._error(f"{name} cannot be read: {one_line(error)}") from error

    def _error(self, said: object) -> ValueError:
        return self._refuse(f"{self.path}: {one_line(said)}")


@contextmanager
def opened(path: Path, refuse: type[ValueError] = ValueError, *, verify: bool = True) -> Iterator[TensorFile]:
    """A safetensors file, or one line that says why it is none.

    Args:
        path: the file.
        refuse: the class of the errors.
        verify: whether checksums are compared, where the file has them.
    """
    if not path.exists():
        raise refuse(f"{path}: must be a file that exists")
    try:
        check_regular(path)
    except OSError as error:
        raise refuse(f"{path}: must be a safetensors file, but {error.strerror}") from error
    with _open(path, refuse) as entered:
        yield TensorFile(path, entered, refuse, verify)


def _open(path: Path, refuse: type[ValueError]) -> Any:
    """The file, opened by safetensors, which opens it twice: one header must not get another file's numbers."""
    for _ in range(TRIES):
        before, said = _identity(path), ""
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError, RuntimeError) as error:
            said = one_line(error)
        if _identity(path) == before:
            if said:
                raise refuse(f"{path}: must be a safetensors file, but {said}")
            return file
    raise refuse(f"{path}: was replaced while it was opened, {TRIES} times: must stay")


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def header(path: Path) -> bytes:
    """The header of a safetensors file, in JSON: names, dtypes, shapes and places of the tensors, and the metadata."""
    check_regular(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, path.stat().st_size))


def _check_header(content: bytes) -> None:
    """What safetensors leaves to torch, or takes the last of."""
    try:
        found = parse_json(content)
    except ValueError as error:
        raise ValueError(f"must be a safetensors file, but in its header {error}") from error
    for name, entry in found.items():
        if name != "__metadata__" and any(size > LARGEST_SIZE for size in entry["shape"]):
            raise ValueError(f"{name} has shape {entry['shape']!r:.60}: must have sizes of at most {LARGEST_SIZE}")


def _os_error(path: Path, error: SafetensorError) -> OSError:
    """The system's error, whose number safetensors puts into its text."""
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path))
    return OSError(f"{path}: cannot be written: {one_line(error)}")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors requires them: on the CPU, contiguous, without shared memory."""
    seen: set[int] = set()
    found = {}
    for key, value in tensors.items():
        if value.is_meta:
            raise ValueError(f"{key} is on the meta device: must have numbers")
        plain = value.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[key] = plain.clone() if place in seen else plain
        seen.add(place)
    return found
