"""Loads models whose experts are in 4 bits, or become so while they are read (docs/four-bit.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from executors._files.arguments import path_of, place_of
from executors._progress import Progress, check_progress
from executors.checkpoint.shards import INDEX, read_json
from executors.hf.load_checkpoint import load_checkpoint
from executors.hf.load_own import load_own
from executors.hf.save import FORMAT
from moe_ref.types import QuantType
from moe_ref.validation import check_quantize
from moe_ref.validation.arrays import check_bool

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_quantized(
    folder: str | os.PathLike[str],
    quant_type: QuantType | None = None,
    nested: bool = True,
    blocksize: int = 64,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = None,
    verify: bool = True,
) -> PreTrainedModel:
    """A model whose experts are in 4 bits, from a folder with config.json and safetensors files.

    Of `save_quantized` it is the other half: the same bytes, dtypes and numbers. No projection is ever dense.

    Any other checkpoint of a family that `executors.checkpoint` understands is read one layer at a time. Dense experts
    are quantised as `quantize_experts` does; beside the result one dense layer is in memory. Experts in MXFP4 (gpt-oss)
    or in bitsandbytes' 4 bits stay what they are. All else is loaded by transformers.

    The class is the one that config.json's ``architectures`` name. Buffers that no file has are made as from_pretrained
    makes them. The model is in evaluation mode; `executors.hf.use` puts it on an executor.

    Args:
        folder: from `save_quantized`, or a checkpoint.
        quant_type: "nf4" or "fp4" for dense experts; None for those that are in 4 bits.
        nested: whether the scales are quantised too, where experts are.
        blocksize: numbers that share a scale, as for `quantize_experts`.
        device: where the model's tensors go.
        progress: None; a callable (done, total), in tensors or in layers; or True for a bar, which needs rich.
        verify: whether files and tensors are compared with the checksums that `save_quantized` writes (5 GB/s or so).
            A config.json that was changed on purpose is refused otherwise.

    Raises:
        BadCheckpoint: a file or a key is missing, damaged, of another shape, or too many; one line says which.
        Unsupported: experts are dense and ``quant_type`` is None, or are in 4 bits and it is not; or they are stored in
            another order, layout or format than their class can hold.
        ValueError: an argument is none of those above; there is no such folder; or config.json names no class of
            transformers.
        TypeError: the folder is no text and no path, the device none, or ``verify`` no bool.
        ModuleNotFoundError: bitsandbytes is missing; or rich, with ``progress=True``.
    """
    if not path_of("folder", folder).is_dir():
        raise ValueError(f"folder={os.fspath(folder)}: must be a folder that exists")
    check_progress(progress)
    check_bool("verify", verify)
    place = place_of(device)
    if quant_type is not None:
        check_quantize(torch.empty(0), "float32", quant_type, blocksize, nested)
    if not _is_own(Path(folder)):
        return load_checkpoint(Path(folder), quant_type, nested, blocksize, place, progress)
    if quant_type is not None:
        raise ValueError(f"quant_type={quant_type!r}: must be None: {folder} is in 4 bits: nothing is quantised twice")
    return load_own(Path(folder), place, progress, verify)


def _is_own(folder: Path) -> bool:
    """Whether `save_quantized` wrote the folder, as its index says."""
    index = folder / INDEX
    metadata = read_json(index).get("metadata") if index.is_file() else None
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT
