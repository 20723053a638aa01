"""Saves a transformers model whose experts are in 4 bits, with the bytes that it has (docs/four-bit.md)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from executors._files.arguments import path_of
from executors._files.tensors import opened, write
from executors._files.whole import cannot_write, locked, sync, write_json
from executors._progress import Progress, check_progress, reporter
from executors._protocol import Unsupported
from executors.checkpoint.shards import INDEX
from executors.hf import folder_checksums
from executors.hf.module import experts_in
from executors.hf.parameters import class_name, parametrization_of, up_name
from executors.hf.storage import MXFP4Parametrization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "moe-ref 4-bit experts, 1"  # in the index's metadata: keys are the model's own
DECODED = "mxfp4_dtypes"  # there too: what each projection in MXFP4 decodes to, which its bytes do not say
TIED = "tied"  # there too: keys that share memory with another, which is written instead
ADAPTERS = (".base_layer.", ".lora_A.", ".lora_B.")
SHARD_BYTES = 4 * 10**9


def save_quantized(
    model: nn.Module, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES, progress: Progress = None
) -> Path:
    """Writes a model whose experts are in 4 bits, for `load_quantized`: the same bytes, dtypes and numbers.

    The folder has config.json, generation_config.json where the model generates, safetensors files and their index.
    Keys are those of ``model.state_dict()``, so experts have bitsandbytes' keys, or gpt-oss' ``*_blocks`` and
    ``*_scales``. Of tensors that are tied one is written. Layers that bitsandbytes quantised (Linear4bit) are written
    in its form too. Adapters of PEFT are not: save them by PEFT.

    The folder appears when all is written. Until then the files lie beside it in ".NAME.partial"; another call with
    the same model goes on there, and writes only the files that are missing or differ. Files and their index have
    checksums.

    Args:
        model: a transformers model; not one of PEFT.
        folder: which must not be there, or be empty.
        shard_bytes: of a file; a tensor that is larger has one of its own.
        progress: None; a callable (done, total) that counts bytes; or True for a bar on stderr, which needs rich.

    Returns:
        The folder.

    Raises:
        TypeError: the model is no transformers model, or has adapters of PEFT; or the folder is no text and no path.
        ValueError: ``shard_bytes`` is no number from 1 on.
        Unsupported: no experts are in 4 bits (save_pretrained saves such a model); or a tensor is on the meta device.
        FileExistsError: the folder has files.
        BlockingIOError: another process is saving there.
        OSError: it cannot be written.
        ModuleNotFoundError: ``progress=True`` without rich.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model is a {class_name(model)}: must be a transformers model (of PEFT: model.get_base_model())"
        )
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes!r:.60}: must be an integer, at least 1")
    path = path_of("folder", folder)
    check_progress(progress)
    (state, tied), target = _state(model), path.resolve()  # of a link, what it means: only that can be replaced
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: must not exist, or be an empty folder")
    shards = list(_shards(state, shard_bytes))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    total, done = sum(value.nbytes for value in state.values()), 0
    with _partial(target) as partial, reporter(progress, total) as tell:
        configs = _write_configs(model, partial)
        tell(0)
        for name, keys in zip(names, shards, strict=True):
            tensors = {key: state[key] for key in keys}
            if not _is_there(partial / name, tensors):
                write(partial / name, tensors, {"format": "pt"})
            done += sum(value.nbytes for value in tensors.values())
            tell(done)
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        metadata = {"total_size": total, "format": FORMAT, DECODED: _decoded(model), TIED: tied}
        index = {"metadata": metadata, "weight_map": where}
        folder_checksums.add(partial, index, [*configs, *names])
        write_json(partial / INDEX, index)
        for file in partial.iterdir():
            if file.name not in names and file.suffix in (".safetensors", ".tmp"):  # of an earlier try: other, killed
                file.unlink()
    return Path(folder)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """The folder in which the files lie until they are all there, for one process alone."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, wait=False):
            partial = target.with_name(f".{target.name}.partial")
            partial.mkdir(exist_ok=True)
            yield partial
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
    except BlockingIOError:
        raise
    except OSError as error:
        raise cannot_write(target, error) from error


def _state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors by key, each memory once; and for other keys of that memory the one that is there.

    Raises:
        TypeError, Unsupported: as `save_quantized`.
    """
    experts = experts_in(model)
    if not any(parametrization_of(own, name) for own in experts.values() for name in (up_name(own), "down_proj")):
        allowed = "must have been quantised by quantize_experts, or be saved by save_pretrained"
        raise Unsupported(f"model={class_name(model)}: no experts are in 4 bits: {allowed}")
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for key, value in model.state_dict().items():
        if any(part in key for part in ADAPTERS):
            raise TypeError(f"model has {key}, of an adapter of PEFT: must have none: save it by PEFT, and unload it")
        if not isinstance(value, Tensor):
            raise Unsupported(f"{key} is a {type(value).__name__}: must be a tensor")
        if value.is_meta:
            raise Unsupported(f"{key} is on the meta device: must have its numbers (offloaded?)")
        place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
        if value.numel() and place in seen:
            tied[key] = seen[place]
            continue
        seen[place] = key
        state[key] = value
    return state, tied


def _decoded(model: nn.Module) -> dict[str, str]:
    """By name: the dtype of each projection in MXFP4."""
    return {
        f"{prefix}.{name}": own.dtype
        for prefix, module in experts_in(model).items()
        for name in (up_name(module), "down_proj")
        if isinstance(own := parametrization_of(module, name), MXFP4Parametrization)
    }


def _write_configs(model: PreTrainedModel, folder: Path) -> list[str]:
    """Writes what transformers writes itself; returns the files' names."""
    config = copy.deepcopy(model.config)
    config.architectures = [class_name(model)]
    if config.dtype is None:
        floats = (value.dtype for value in model.parameters() if value.is_floating_point())
        config.dtype = str(next(floats, torch.float32)).rpartition(".")[2]
    names = ["config.json"]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        names.append("generation_config.json")
        model.generation_config.save_pretrained(folder)
    for name in names:
        sync(folder / name)
    return names


def _shards(state: dict[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """The keys of each file, in order."""
    keys: list[str] = []
    size = 0
    for key, value in state.items():
        if keys and size + value.nbytes > shard_bytes:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += value.nbytes
    yield keys


def _is_there(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether an earlier try wrote this file: the same keys, dtypes, shapes and bytes."""
    if not path.is_file():
        return False
    try:
        with opened(path) as file:
            return file.names == tensors.keys() and all(_same(file.tensor(k), value) for k, value in tensors.items())
    except ValueError:
        return False


def _same(there: Tensor, value: Tensor) -> bool:
    if (there.dtype, there.shape) != (value.dtype, value.shape):
        return False
    plain = value.detach().cpu().contiguous()
    return torch.equal(there.reshape(-1).view(torch.uint8), plain.reshape(-1).view(torch.uint8))
