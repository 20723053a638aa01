"""Loads any checkpoint of a family that is understood, its experts in 4 bits, one layer at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from executors import checkpoint
from executors._progress import Progress, reporter
from executors._protocol import Unsupported
from executors.checkpoint import BadCheckpoint, Checkpoint, CheckpointLayer
from executors.hf.classes import check_layers, class_of, finish, told_of
from executors.hf.module import config_of_experts, experts_in
from executors.hf.parameters import up_name
from executors.hf.quantize import quantized
from executors.hf.storage import check_library, put
from moe_ref.types import GateUpLayout, MoEWeights, MXFP4Tensor, NF4Tensor, PackedTensor, QuantType

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = ("bitsandbytes",)  # quantisers of transformers that the rest of a model may have


def load_checkpoint(
    folder: Path, quant_type: QuantType | None, nested: bool, blocksize: int, device: torch.device, progress: Progress
) -> PreTrainedModel:
    """The model of a checkpoint: its experts by `executors.checkpoint`, all else by transformers.

    Raises:
        BadCheckpoint, Unsupported, ValueError: as `load_quantized`.
    """
    check_library()
    kind, config = class_of(folder)
    source = checkpoint.open(folder)
    method = _method(config)
    if method not in (None, "mxfp4", *KEPT):
        raise Unsupported(f"{folder}: quant_method={method!r}: must be dense, mxfp4 or bitsandbytes")
    if method == "mxfp4":
        del config.quantization_config  # its experts are put where they belong below
    for layer in source.layers:  # from headers and config.json, before anything is read
        source.config(layer)
        _check_form(f"{folder}: {layer.prefix}experts", layer.form.partition(",")[0], quant_type)
    rest = source.others()
    check_layers(folder, config, len(rest))
    model, shapes = _without_experts(kind, config, rest, folder)
    model.to(device)  # type: ignore[arg-type]
    layers = _layers(model, source)
    with reporter(progress, len(layers)) as tell:
        tell(0)
        for done, (module, layer) in enumerate(layers, 1):
            _fill(module, source, layer, shapes[module], (quant_type, nested, blocksize), device)
            tell(done)
    finish(model, folder)
    return model


def _method(config: Any) -> str | None:
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    found = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return str(getattr(found, "value", found))


def _without_experts(
    kind: type[nn.Module], config: Any, rest: dict[str, Tensor], folder: Path
) -> tuple[PreTrainedModel, dict[nn.Module, dict[str, tuple[int, ...]]]]:
    """The model with all but its experts' projections, and the shapes that these must have.

    transformers renames and reorders what checkpoints call otherwise. Projections have no numbers meanwhile, so that it
    makes none for them.
    """
    shapes: dict[nn.Module, dict[str, tuple[int, ...]]] = {}

    ours: set[str] = set()

    def init(self: Any, *args: Any, **given: Any) -> None:
        kind.__init__(self, *args, **given)
        for prefix, module in experts_in(self).items():
            names = (up_name(module), "down_proj")
            shapes[module] = {name: tuple(getattr(module, name).shape) for name in names}
            ours.update(re.escape(f"{prefix}.{name}{end}") + "$" for name in names for end in ("", "_bias"))
            for name in names:
                empty = getattr(module, name).new_empty(shapes[module][name][0], 0, 0)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
        self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), *ours}

    made: Any = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
    with told_of(folder):
        given = {"state_dict": rest, "output_loading_info": True, "ignore_mismatched_sizes": True}  # told below
        model, info = made.from_pretrained(None, config=config, **given)
    model.__class__ = kind
    model._keys_to_ignore_on_load_missing -= ours
    for what, allowed in (("missing_keys", "must be there"), ("unexpected_keys", "is unknown: must not be there")):
        if info[what]:
            raise BadCheckpoint(f"{folder}: {min(map(str, info[what]))}: {allowed}, for a {kind.__name__}")
    if info["mismatched_keys"]:
        raise BadCheckpoint(f"{folder}: {sorted(map(str, info['mismatched_keys']))[0]}: must have the model's shape")
    return model, shapes


def _layers(model: PreTrainedModel, source: Checkpoint) -> list[tuple[nn.Module, CheckpointLayer]]:
    """Experts modules and the layers that are theirs, by number."""
    found = []
    numbers: set[int] = set()
    for name, module in experts_in(model).items():
        number = int(["0", *re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)][-1])
        if number in numbers:
            raise Unsupported(f"{source.path}: several experts have number {number}, of {name}: must be one each")
        numbers.add(number)
        found.append((module, source.layer(number)))
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for layer in source.layers:
        if layer.index not in numbers and not any(re.search(pattern, f"{layer.prefix}experts") for pattern in ignored):
            raise BadCheckpoint(f"{source.path}: {layer.prefix}experts are too many: must be those of config.json")
    return found


def _fill(
    module: Any,
    source: Checkpoint,
    layer: CheckpointLayer,
    shapes: dict[str, tuple[int, ...]],
    form: tuple[QuantType | None, bool, int],
    device: torch.device,
) -> None:
    """Reads one layer, and quantises what is dense."""
    weights = source.weights(layer)
    where = f"{source.path}: {layer.prefix}experts"
    own = config_of_experts(module).gate_up_layout
    if weights.config.gated and weights.config.gate_up_layout != own:
        weights = _relaid(where, weights, own)
    for name, value in zip(shapes, (weights.gate_up_proj, weights.down_proj), strict=True):
        tensor = _packed(where, name, value, module, form, device)
        stored = tensor.shape
        if isinstance(tensor, MXFP4Tensor) and module.is_transposed:
            stored = (stored[0], stored[2], stored[1])
        if stored != shapes[name]:
            raise BadCheckpoint(f"{where}.{name} has shape {stored}: must be {shapes[name]}, as config.json has it")
        put(module, name, tensor)
    _fill_biases(where, module, weights, device)


def _relaid(where: str, weights: MoEWeights, layout: GateUpLayout) -> MoEWeights:
    """Gate and up rows in the class's layout, where a file has the other."""
    rows, bias = weights.gate_up_proj, weights.gate_up_proj_bias
    if isinstance(rows, PackedTensor) or bias is not None:
        what = "in 4 bits" if isinstance(rows, PackedTensor) else "with biases"
        raise Unsupported(
            f"{where} have {weights.config.gate_up_layout} gates {what}: must be {layout}, as their class"
        )
    parts = (2, -1) if layout == "interleaved" else (-1, 2)
    relaid = rows.unflatten(1, parts).transpose(1, 2).flatten(1, 2)
    return replace(weights, gate_up_proj=relaid, config=replace(weights.config, gate_up_layout=layout))


def _packed(
    where: str,
    name: str,
    value: Tensor | PackedTensor,
    module: Any,
    form: tuple[QuantType | None, bool, int],
    device: torch.device,
) -> NF4Tensor | MXFP4Tensor:
    quant_type, nested, blocksize = form
    dtype = getattr(module, name).dtype
    _check_form(f"{where}.{name}", value.quant_type if isinstance(value, PackedTensor) else "dense", quant_type)
    if isinstance(value, PackedTensor):
        moved: Any = value.map(lambda array: array.clone().to(device))
        if isinstance(moved, MXFP4Tensor):
            return replace(moved, dtype=str(dtype).rpartition(".")[2])
        stored = moved.transpose(1, 2) if module.is_transposed else moved
        if stored.transposed:
            raise Unsupported(f"{where}.{name} is in 4 bits in the other order: must be stored as the class has it")
        return stored
    assert quant_type is not None
    dense = value.transpose(1, 2) if module.is_transposed else value
    try:
        return quantized(dense.to(device, dtype), quant_type, nested, blocksize)
    except ValueError as error:
        raise BadCheckpoint(f"{where}.{name}: {error}") from error


def _check_form(where: str, kind: str, quant_type: QuantType | None) -> None:
    """Refuses dense projections that are not to be quantised, and others that are."""
    if kind == "dense" and quant_type is None:
        raise Unsupported(f"{where}: dense: quant_type must be 'nf4' or 'fp4'")
    if kind != "dense" and quant_type is not None:
        raise Unsupported(f"{where}: in {kind}: quant_type={quant_type!r} must be None: nothing is quantised twice")


def _fill_biases(where: str, module: Any, weights: MoEWeights, device: torch.device) -> None:
    """Biases, which belong to the layer's keys."""
    found = {f"{up_name(module)}_bias": weights.gate_up_proj_bias, "down_proj_bias": weights.down_proj_bias}
    for name, bias in found.items():
        own = getattr(module, name) if module.has_bias else None
        if own is not None and bias is None:
            raise BadCheckpoint(f"{where}.{name} is missing: must be there, for a {type(module).__name__}")
        if own is None and bias is not None:
            raise BadCheckpoint(f"{where}.{name} is there: must not be, for a {type(module).__name__}")
        if own is not None and bias is not None:
            setattr(module, name, nn.Parameter(bias.to(device, own.dtype).clone()))
