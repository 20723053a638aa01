"""Tiles that ``python -m executors tune`` chose on this machine: read once per process, and only if asked for.

They change the last bits of a result. So only ``executors.get("triton", tuned=True)`` reads them. A call without an
entry takes the shipped configuration.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton
from torch import Tensor

from executors._base.arguments import Projection
from executors._triton import tuned_file
from executors._triton.configs import KernelConfig
from executors._triton.device import INTERPRETED
from executors._triton.launch import operands
from executors._triton.launch.operands import Matrices
from executors._triton.layer import Layer
from executors._triton.tuned_file import Entries, Key
from moe_ref.validation import dtype_name

DIGESTED = ("kernels", "launch")  # folders; launches decide what becomes of a tile
DIGITS = 12


def default_path() -> Path:
    """``moe-ref/tuned.json`` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / "moe-ref" / "tuned.json"


@cache
def table() -> Entries:
    """The entries of the default file for these versions, as at the first call: forward and backward see the same."""
    return tuned_file.read(default_path(), versions())


def config_for(layer: Layer, precision: str, aligned: bool) -> KernelConfig | None:
    """The tiles that were chosen for such a call, or None."""
    entries = table()
    return entries.get(key_of(layer, precision, aligned)) if entries else None


def key_of(layer: Layer, precision: str, aligned: bool) -> Key:
    """What the choice for a call depends on.

    Args:
        layer: the layer, with one slot or more.
        precision: of products: "ieee" or "tf32".
        aligned: as `executors._triton.launch.operands.are_aligned` has it.
    """
    experts, both, hidden = layer.up.matrices.shape
    act = layer.act
    return Key(
        device_name(layer.x.device),
        versions(),
        dtype_name(layer.x),
        precision,
        experts,
        layer.topk_ids.shape[1],
        hidden,
        both // 2 if act.layout else both,
        storage_of(layer.up, layer.down) if aligned else "not aligned",
        f"{act.name} {act.layout}".rstrip(),
        max(map(_rank_of, (layer.up, layer.down))),
        bucket_of(layer.topk_ids.numel(), experts),
    )


def bucket_of(slots: int, experts: int) -> int:
    """The least b for which S / E <= 2**b; in integers, so that powers of two are exact."""
    if slots > experts:
        return (-(-slots // experts) - 1).bit_length()
    return 1 - (experts // slots).bit_length()


def storage_of(up: Projection[Matrices], down: Projection[Matrices]) -> str:
    """Which dimension of each is last in memory, such as "rows, columns"."""
    strides = [own.matrices.stride(2) for own in (up, down) if isinstance(own.matrices, Tensor)]
    return ", ".join("rows" if stride == 1 else "columns" for stride in strides)


@cache
def device_name(device: torch.device) -> str:
    """A GPU's name and architecture."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"{properties.name}, {properties.gcnArchName}"
    return f"{properties.name}, {properties.major}.{properties.minor}"


@cache
def versions() -> str:
    """The versions of torch, Triton and this package, and a digest of the kernels: other kernels want other tiles."""
    try:
        own = version("moe-ref")
    except PackageNotFoundError:
        own = "unknown"
    digest = hashlib.sha256()
    package = resources.files("executors._triton")
    for folder in DIGESTED:
        for file in sorted(package.joinpath(folder).iterdir(), key=str):
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    text = digest.hexdigest()[:DIGITS]
    return f"torch {torch.__version__}, triton {triton.__version__}, moe-ref {own}, kernels {text}"


def _rank_of(projection: Projection[Matrices]) -> int:
    """The rank of a projection's adapter, rounded up as the kernels do; 0 without one."""
    factor = projection.lora_b
    return 0 if factor is None else operands.ranks_at_a_time(factor.shape[2])
