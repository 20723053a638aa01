"""4-bit tensors in a safetensors file, with the entries that bitsandbytes writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executors._files.arguments import path_of, place_of
from executors._files.tensors import opened, write
from executors._files.text import one_line, parse_json
from executors.nf4.convert import shown
from executors.nf4.state_dict import fields_by_expert, from_state_dict, of_expert, to_state_dict
from moe_ref.types import MoEWeights, NF4Tensor
from moe_ref.validation.arrays import check_bool

TRANSPOSED = "transposed"  # metadata: a JSON list of the names of transposed tensors


def save(path: str | os.PathLike[str], tensors: Mapping[str, NF4Tensor | Tensor]) -> None:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        tensors: by name: 4-bit tensors, whose entries are those of `to_state_dict`, and any other tensors. The file's
            metadata lists those that are read transposed, and has a checksum of each entry, for `load`.

    Raises:
        ValueError, TypeError: one line naming the entry, and what is allowed.
        OSError: the file cannot be written.
    """
    if not isinstance(tensors, Mapping):
        hint = "; weights.packed() has its 4-bit projections" if isinstance(tensors, MoEWeights) else ""
        raise TypeError(f"tensors is a {type(tensors).__name__}: must be a dict of tensors by name{hint}")
    entries: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, NF4Tensor | Tensor):
            raise TypeError(f"tensors[{name!r}]={shown(tensor)}: must be an NF4Tensor or a torch.Tensor")
        own = to_state_dict(tensor, name) if isinstance(tensor, NF4Tensor) else {name: tensor}
        twice = sorted(own.keys() & entries.keys())
        if twice:
            raise ValueError(f"tensors[{name!r}] has an entry {twice[0]!r}: must not be that of another tensor")
        entries |= own
    transposed = [name for name, tensor in tensors.items() if isinstance(tensor, NF4Tensor) and tensor.transposed]
    write(path_of("path", path), entries, {"format": "pt", TRANSPOSED: json.dumps(transposed)})


def load(
    path: str | os.PathLike[str],
    name: str,
    *,
    transposed: bool | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> NF4Tensor:
    """Reads one 4-bit tensor, and only that, from a safetensors file.

    Args:
        path: a file from `save`, or any other file with bitsandbytes' entries.
        name: as for `from_state_dict`; "{}" stands for the number of an expert.
        transposed: whether the tensor is read transposed. None: as the metadata says, which only `save` writes; other
            files are read as stored.
        device: the device for its bytes.
        verify: whether the entries are compared with their checksums, which only `save` writes (5 GB/s or so).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: one line naming the file, what is wrong, and what is allowed.
    """
    if not path_of("path", path).is_file():
        raise FileNotFoundError(f"{path}: must be a file that exists")
    where = place_of(device)
    check_bool("verify", verify)
    with opened(Path(path), verify=verify) as file:
        fields = fields_by_expert(file.names, name)
        prefixes = [of_expert(name, expert) for expert in fields]
        keys = [
            f"{prefix}.{field}" if field else prefix
            for prefix, own in zip(prefixes, fields.values(), strict=True)
            for field in own
        ]
        state = {key: file.tensor(key) for key in keys}
    noted = name in _noted(path, file.metadata)
    if transposed is False and noted:
        raise ValueError(f"{path}: transposed=False: must be True or None, since the file lists {name} as transposed")
    try:
        tensor = from_state_dict(state, name, transposed=noted if transposed is None else transposed)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {one_line(error)}") from error
    return tensor.map(lambda array: array.to(where))


def _noted(path: Any, metadata: dict[str, str]) -> list[str]:
    text = metadata.get(TRANSPOSED, "[]")
    try:
        names = parse_json(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: metadata {TRANSPOSED}={text!r:.60}: must be a JSON list of names")
    return names
