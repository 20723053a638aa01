"""Loads what `save_quantized` wrote."""

from __future__ import annotations

from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from executors import mxfp4, nf4
from executors._files.text import one_line
from executors._progress import Progress, reporter
from executors.checkpoint import BadCheckpoint
from executors.checkpoint.shards import INDEX, Reader, Shards, read_json
from executors.hf import folder_checksums
from executors.hf.classes import check_layers, class_of, default_dtype, finish, told_of
from executors.hf.module import experts_in
from executors.hf.parameters import up_name
from executors.hf.save import DECODED, TIED
from executors.hf.storage import check_library, put
from moe_ref.types import MXFP4Tensor, NF4Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES = tuple(f"quant_state.bitsandbytes__{quant_type}" for quant_type in ("nf4", "fp4"))
FIELDS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *(f".{state}" for state in STATES))


def load_own(folder: Path, device: torch.device, progress: Progress, verify: bool) -> PreTrainedModel:
    """A model that `save_quantized` wrote: the same bytes, dtypes and numbers.

    It is made on the meta device, and gets each tensor from its file. So no projection is ever dense.

    Raises:
        BadCheckpoint: a file or a key is missing, broken, of another shape, or too many; one line says which.
        ValueError: config.json names no class of transformers.
    """
    check_library()
    index = read_json(folder / INDEX)
    if verify:
        folder_checksums.check(folder, index)
    kind, config = class_of(folder)
    shards, metadata = Shards(folder, verify=verify), index["metadata"]
    check_layers(folder, config, len(shards.where))
    with told_of(folder / "config.json"):
        with default_dtype(config.dtype or torch.float32), torch.device("meta"):
            model: Any = kind(config)
        experts_in(model)  # has some
        quantizer = _quantizer(model, config)
    decoded, tied = (_texts(metadata.get(name)) for name in (DECODED, TIED))
    read: set[str] = set()
    with shards.reading() as reader, reporter(progress, len(shards.where)) as tell:
        tell(0)
        source = _Source(reader, device, decoded, tied, read, tell)
        packed = _read_experts(model, source)
        _read_rest(model, source, {f"{name}.{own}" if name else own for name, own in packed})
    if unknown := sorted(shards.where.keys() - read):
        raise BadCheckpoint(f"{shards.where[unknown[0]]}: {unknown[0]} is unknown: must be a tensor of {kind.__name__}")
    _initialise(model, device)
    modules = dict(model.named_modules())
    for (name, own), tensor in packed.items():
        put(modules[name], own, tensor)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    finish(model, folder)
    return model


def _texts(values: Any) -> dict[str, str]:
    """What of the index's metadata is text by key."""
    return {key: value for key, value in values.items() if isinstance(value, str)} if isinstance(values, dict) else {}


class _Source:
    """Tensors by key, and which keys were read."""

    def __init__(
        self,
        reader: Reader,
        device: torch.device,
        decoded: dict[str, str],
        tied: dict[str, str],
        read: set[str],
        tell: Any,
    ) -> None:
        self.reader, self.device, self.read, self.tell = reader, device, read, tell
        self.decoded, self.tied = decoded, tied

    def __contains__(self, key: str) -> bool:
        return self._stored(key) in self.reader.shards.where

    def _stored(self, key: str) -> str:
        """The key under which a file has it: another one for what was tied when it was saved."""
        return key if key in self.reader.shards.where else self.tied.get(key, key)

    def tensor(self, key: str) -> Tensor:
        """One tensor in memory of its own, on the device."""
        key = self._stored(key)
        found = self.reader.tensor(key).clone().to(self.device)
        self.read.add(key)
        self.tell(len(self.read))
        return found

    def state(self, key: str) -> dict[str, Tensor]:
        """bitsandbytes' entries of one tensor."""
        return {f"{key}{field}": self.tensor(f"{key}{field}") for field in FIELDS if f"{key}{field}" in self}

    def refuse(self, key: str, said: str) -> BadCheckpoint:
        """What to raise for a key."""
        return BadCheckpoint(f"{self.reader.shards.where.get(key, self.reader.shards.folder)}: {key}{said}")


def _read_experts(model: nn.Module, source: _Source) -> dict[tuple[str, str], NF4Tensor | MXFP4Tensor]:
    """The projections in 4 bits, by module and name; some may be dense, which the rest has."""
    found: dict[tuple[str, str], NF4Tensor | MXFP4Tensor] = {}
    for prefix, module in experts_in(model).items():
        for name in (up_name(module), "down_proj"):
            key = f"{prefix}.{name}" if prefix else name
            shape = tuple(getattr(module, name).shape)
            if f"{key}_blocks" in source:
                found[prefix, name] = _mxfp4(source, key, shape, bool(module.is_transposed))
            elif any(f"{key}.{state}" in source for state in STATES):
                found[prefix, name] = _nf4(source, key, shape)
    return found


def _nf4(source: _Source, key: str, shape: tuple[int, ...]) -> NF4Tensor:
    try:
        tensor = nf4.from_state_dict(source.state(key), key)
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"{source.reader.shards.where.get(key, source.reader.shards.folder)}: {error}") from error
    if tensor.shape != shape:
        raise source.refuse(key, f" has shape {tensor.shape}: must be {shape}, as config.json has it")
    return tensor


def _mxfp4(source: _Source, key: str, shape: tuple[int, ...], transposed: bool) -> MXFP4Tensor:
    for part in ("blocks", "scales"):
        if f"{key}_{part}" not in source:
            raise source.refuse(f"{key}_{part}", " is missing: must be there, with the other part in MXFP4")
    try:
        parts = [source.tensor(f"{key}_{part}") for part in ("blocks", "scales")]
        tensor = mxfp4.from_blocks(parts[0], parts[1], dtype=source.decoded.get(key, "bfloat16"))
    except (ValueError, TypeError) as error:
        raise source.refuse(f"{key}_blocks", f": {error}") from error
    read_as = (shape[0], shape[2], shape[1]) if transposed else shape
    if tensor.shape != read_as:
        raise source.refuse(f"{key}_blocks", f" means shape {tensor.shape}: must be {read_as}, as config.json has it")
    return tensor


def _read_rest(model: nn.Module, source: _Source, packed: set[str]) -> None:
    """All other parameters and buffers. Those that are tied are one object, and one key."""
    wanted = model.state_dict().keys() - packed
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        for name in (*module._parameters, *module._buffers):
            key = f"{prefix}.{name}" if prefix else name
            if key in wanted:
                places.setdefault(id(getattr(module, name)), []).append((module, name, key))
    for aliases in places.values():
        module, name, _ = aliases[0]
        key = next((key for _, _, key in aliases if key in source), aliases[0][2])
        if key not in source:
            raise source.refuse(key, f" is missing: must be there, for a {type(model).__name__}")
        value = _linear4bit(module, source, key) if f"{key}.absmax" in source else _dense(module, name, source, key)
        for owner, own, _ in aliases:
            setattr(owner, own, value)


def _dense(module: nn.Module, name: str, source: _Source, key: str) -> Tensor:
    there: Tensor = getattr(module, name)
    value = source.tensor(key)
    if value.shape != there.shape or value.is_floating_point() != there.is_floating_point():
        own = f"{str(value.dtype).rpartition('.')[2]} {tuple(value.shape)}"
        wanted = f"{str(there.dtype).rpartition('.')[2]} {tuple(there.shape)}"
        raise source.refuse(key, f" is {own}: must be {wanted}, as config.json has it")
    if name in module._parameters:
        value = nn.Parameter(value, requires_grad=there.requires_grad)
    value._is_hf_initialized = True  # type: ignore[attr-defined]
    return value


def _linear4bit(module: Any, source: _Source, key: str) -> Tensor:
    """A layer that bitsandbytes quantised, by the form in which it is stored."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    if not isinstance(module, Linear4bit):
        raise source.refuse(key, f" is in 4 bits: must be dense in a {type(module).__name__}")
    state = source.state(key)
    stats = {entry.removeprefix(f"{key}."): value for entry, value in state.items() if entry != key}
    try:  # as bitsandbytes reads them: after inference on a CPU their statistics are in bf16
        value: Any = Params4bit.from_prequantized(state[key], stats, device=source.device, module=module)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise source.refuse(key, f": bitsandbytes cannot read it: {type(error).__name__} {one_line(error)}") from error
    shape, size = (module.out_features, module.in_features), value.nbytes
    wanted = ceil(prod(shape) / 2)
    if tuple(value.quant_state.shape) != shape or size != wanted:
        own = f"{size} bytes of shape {tuple(value.quant_state.shape)}"
        raise source.refuse(key, f" has {own}: must have {wanted} of {shape}, as config.json has it")
    value._is_hf_initialized = True
    found: Tensor = value
    return found


def _quantizer(model: Any, config: Any) -> Any:
    """transformers' own, where bitsandbytes quantised the linear layers; it puts its layers into the model."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(given, pre_quantized=True)
    quantizer.preprocess_model(model=model, device_map=None)
    return quantizer


def _initialise(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no file has, made by the model's own code, which spares what is marked."""
    saved = model.state_dict().keys()
    for prefix, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is not None and (f"{prefix}.{name}" if prefix else name) not in saved:
                setattr(module, name, torch.empty_like(value, device=device))
    model.initialize_weights()  # type: ignore[no-untyped-call]
