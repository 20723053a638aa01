"""Checksums of tensors in a safetensors file, in its metadata: CRC-32 of each tensor, and of the other metadata.

They find what the format cannot: a bit that flipped in a number, in a shape or in a configuration, and files of two
saves that were mixed. They do not protect from somebody who changes a file on purpose and its checksums with it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executors._files.text import parse_json

KEY = "checksums"  # in the metadata: JSON {"metadata": checksum, "tensors": {name: checksum}}
DIGITS = 8


def of_bytes(content: bytes | memoryview) -> str:
    """CRC-32, in hexadecimal digits."""
    return f"{zlib.crc32(content):0{DIGITS}x}"


def of_tensor(value: Tensor) -> str:
    """Of dtype, shape and bytes."""
    form = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}".encode()
    plain: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(plain, zlib.crc32(form)):0{DIGITS}x}"


def of_json(content: Any) -> str:
    """Of a value, however its text is laid out."""
    return of_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def described(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the checksums."""
    sums = {"metadata": of_json(dict(metadata)), "tensors": {name: of_tensor(value) for name, value in tensors.items()}}
    return {**metadata, KEY: json.dumps(sums, sort_keys=True)}


@dataclass(frozen=True)
class Checksums:
    """What a file says of itself; the tensors are None where it has no checksums."""

    tensors: Mapping[str, str] | None

    @classmethod
    def read(cls, metadata: Mapping[str, str], names: set[str]) -> Checksums:
        """The checksums in a file's metadata, which must fit it.

        Raises:
            ValueError: they are broken, those of the metadata differ, or those of some tensor are missing; in one line.
        """
        if KEY not in metadata:
            return cls(None)
        found = _parsed(metadata[KEY])
        own, tensors = found["metadata"], found["tensors"]
        rest = {key: value for key, value in metadata.items() if key != KEY}
        if own != (said := of_json(rest)):
            raise ValueError(f"metadata has checksum {said}: {_allowed(own)}")
        if odd := sorted(names ^ tensors.keys()):
            there = "has no checksum" if odd[0] in names else "is missing"
            raise ValueError(f"{odd[0]!r:.200} {there}: the file is damaged or was changed")
        return cls(tensors)

    def check(self, name: str, value: Tensor) -> None:
        """Compares a tensor that was read.

        Raises:
            ValueError: it differs; in one line.
        """
        if self.tensors is not None and self.tensors[name] != (own := of_tensor(value)):
            raise ValueError(f"{name} has checksum {own}: {_allowed(self.tensors[name])}")


def _allowed(said: Any) -> str:
    return f"must be {said!r:.20}, as when it was written: the file is damaged or was changed"


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys() != {"metadata", "tensors"} or not isinstance(found["tensors"], dict):
        raise ValueError(f"metadata {KEY}={text!r:.60}: must be a JSON object of metadata and tensors")
    return found
