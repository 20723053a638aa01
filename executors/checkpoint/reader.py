"""A checkpoint, and its layers one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executors.checkpoint import config as configs
from executors.checkpoint import projections
from executors.checkpoint.config import Section
from executors.checkpoint.errors import BadCheckpoint
from executors.checkpoint.names import Block, blocks_of
from executors.checkpoint.projections import Source
from executors.checkpoint.shards import Shards, read_json
from moe_ref.types import MoEConfig, MoEWeights
from moe_ref.validation import check_routed_weights

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class CheckpointLayer:
    """One Mixture-of-Experts layer of a checkpoint.

    Attributes:
        index: its number.
        prefix: what stands before its keys, such as "model.layers.3.mlp.".
        form: how its projections are stored: "dense", "mxfp4", "nf4" or "fp4", and "stacked" or "per expert".
    """

    index: int
    prefix: str
    form: str
    block: Block = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Router:
    """What router logits are made of.

    Attributes:
        weight: [E, H].
        bias: [E], or None.
        in_fp32: whether the family takes the product in fp32 whatever the model's dtype.
    """

    weight: Tensor
    bias: Tensor | None
    in_fp32: bool

    def logits(self, x: Tensor) -> Tensor:
        """[T, E] The router's product, summed in fp32, rounded to the dtype in which the family takes it.

        Args:
            x: [T, H] hidden states.

        Raises:
            ValueError: H is not the router's.
        """
        if x.ndim != 2 or x.shape[1] != self.weight.shape[1]:
            allowed = f"must be (T, {self.weight.shape[1]}), as the router of shape {tuple(self.weight.shape)} takes it"
            raise ValueError(f"x.shape={tuple(x.shape)}: {allowed}")
        dtype = torch.float32 if self.in_fp32 else torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class Checkpoint:
    """A folder with config.json and safetensors files, of which each layer is read by itself.

    Attributes:
        path: the folder.
        layers: its Mixture-of-Experts layers, by number and prefix.
    """

    def __init__(self, path: Path, family: str | None = None) -> None:
        if family is not None:
            configs.check_family(family)
        self.path = path
        self._family = family
        self._shards = Shards(path)
        self._file = path / configs.NAME
        self._config = read_json(self._file)
        self.layers = [_described(block) for block in blocks_of(self._shards.where)]
        if not self.layers:
            raise BadCheckpoint(f"{path} has no Mixture-of-Experts layer: must have keys such as *.experts.0.w1.weight")

    def layer(self, which: int | str | CheckpointLayer) -> CheckpointLayer:
        """A layer by its number, or by its prefix.

        Raises:
            BadCheckpoint: there is none, or several have that number.
        """
        if isinstance(which, CheckpointLayer):
            return which
        found = [layer for layer in self.layers if which in (layer.index, layer.prefix, layer.prefix.rstrip("."))]
        if len(found) == 1:
            return found[0]
        if found:
            prefixes = " or ".join(layer.prefix for layer in found)
            raise BadCheckpoint(f"{self.path}: layer {which} is there {len(found)} times: must be named, {prefixes}")
        known = ", ".join(str(layer.index) for layer in self.layers)
        raise BadCheckpoint(f"{self.path} has no layer {which}: must be one of {known:.200}, or a prefix")

    def section(self, which: int | str | CheckpointLayer) -> Section:
        """The part of config.json that belongs to a layer, with its family's name.

        Raises:
            BadCheckpoint: no family is known; ``family=`` must be given.
        """
        return configs.section_of(self._file, self._config, self.layer(which).prefix, self._family)

    def config(self, which: int | str | CheckpointLayer) -> MoEConfig:
        """A layer's configuration: what its family fixes, and what config.json says.

        Raises:
            BadCheckpoint: the family is unknown or refused, or an entry is missing or not understood.
        """
        layer = self.layer(which)
        return configs.config_of(self.section(layer), layer.index, joined=layer.block.naming.joined)[0]

    def weights(self, which: int | str | CheckpointLayer, progress: Progress | None = None) -> MoEWeights:
        """One layer's parameters and configuration; nothing else is read.

        Dense stacks are views of the file, transposed where it has them so; other dense projections are filled expert
        by expert. What is in 4 bits keeps its bytes.

        Args:
            which: a layer of `layers`, its number or its prefix.
            progress: a callable (done, total), both in tensors.

        Raises:
            BadCheckpoint: it cannot be read exactly; one line says the file, the key, and what is allowed.
        """
        layer = self.layer(which)
        section, naming, block = self.section(layer), layer.block.naming, layer.block
        config, biased = configs.config_of(section, layer.index, joined=naming.joined)
        family = section.family
        if naming.gated != family.gated:
            there = "gate and up projections" if naming.gated else "no gate projections"
            allowed = f"must have {'them' if family.gated else 'none'}, as family {section.name} has"
            raise BadCheckpoint(f"{self.path}: {layer.prefix}experts have {there}: {allowed}")
        if unknown := block.unknown(set(family.selection_bias)):
            allowed = f"must be one of {', '.join(sorted(naming.names))}"
            raise BadCheckpoint(f"{self._shards.where.get(unknown, self.path)}: {unknown} is not understood: {allowed}")
        with self._shards.reading() as reader:
            tell = _counter(progress, sum(map(len, block.keys.values())))
            source = Source(reader, block, lambda: self._packed_dtype(section), tell)
            tensors = _per_expert(source) if naming.per_expert else _stacked(source, family.stacks, section.name)
            bias = self._first(source, family.selection_bias) if biased else None
            weights = MoEWeights(**tensors, selection_bias=None if bias is None else bias.reshape(-1), config=config)
            self._check_count(source, family.router, layer, weights.num_experts)
        try:
            check_routed_weights(weights)
        except (ValueError, TypeError) as error:
            raise BadCheckpoint(f"{self.path}: {layer.prefix}experts: {error}") from error
        return weights

    def others(self) -> dict[str, Tensor]:
        """All tensors by key but the projections of the layers and their biases, in memory of their own.

        Raises:
            BadCheckpoint: one cannot be read.
        """
        projections = {key for layer in self.layers for key in layer.block.keys_of(layer.block.naming.names)}
        with self._shards.reading() as reader:
            return {key: reader.tensor(key).clone() for key in self._shards.where if key not in projections}

    def router(self, which: int | str | CheckpointLayer) -> Router:
        """What a layer's router logits are made of.

        Raises:
            BadCheckpoint: the family is unknown or refused, or the router is not where the family has it.
        """
        layer = self.layer(which)
        family = self.section(layer).family
        with self._shards.reading() as reader:
            source = Source(reader, layer.block, lambda: "bfloat16", lambda: None)
            weight = self._first(source, family.router)
            bias = self._first(source, family.router_bias) if family.router_bias else None
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = f"{tuple(weight.shape)}{'' if bias is None else f' and {tuple(bias.shape)}'}"
            raise BadCheckpoint(f"{self.path}: {layer.prefix}{family.router[0]} has shape {shapes}: must be (E, H)")
        return Router(weight, bias, family.router_in_fp32)

    def _check_count(self, source: Source, router: tuple[str, ...], layer: CheckpointLayer, experts: int) -> None:
        """The router chooses among as many experts as there are: of tensors of their own the last may be missing."""
        rows = [source.reader.shape(key)[0] for name in router if (key := source.key(name)) in self._shards.where]
        if rows and rows[0] != experts:
            where = f"{self.path}: {layer.prefix}experts are {experts}"
            raise BadCheckpoint(f"{where}: must be {rows[0]}, as its router has rows")

    def _first(self, source: Source, names: tuple[str, ...]) -> Tensor:
        """The first of several names that is there."""
        for name in names:
            if (key := source.key(name)) in self._shards.where:
                return source.tensor(key)
        both = " or ".join(source.key(name) for name in names)
        raise BadCheckpoint(f"{self.path}: {both} is missing: must be there, for this family")

    def _packed_dtype(self, section: Section) -> str:
        """What MXFP4 decodes to: the model's dtype, or bf16 where config.json does not say."""
        said = (values.get(name) for values in (section.values, self._config) for name in ("dtype", "torch_dtype"))
        return next((str(dtype) for dtype in said if dtype is not None), "bfloat16")


def _described(block: Block) -> CheckpointLayer:
    form = "per expert" if block.naming.per_expert else "stacked"
    return CheckpointLayer(
        block.index, block.prefix, f"{projections.storage(block, block.naming.up[0])}, {form}", block
    )


def _counter(progress: Progress | None, total: int) -> Callable[[], object]:
    """A function to call after each tensor."""
    if progress is None:
        return lambda: None
    say, done = progress, 0

    def tell() -> None:
        nonlocal done
        done += 1
        say(min(done, total), total)

    return tell


def _per_expert(source: Source) -> dict[str, Any]:
    """Projections and biases of which each expert has tensors of its own."""
    naming, keys = source.block.naming, source.block.keys
    present = {expert for name in naming.names for expert in keys.get(name, ()) if expert is not None}
    count = max(present) + 1
    tensors: dict[str, Any] = {
        "gate_up_proj": projections.experts(source, naming.up, count),
        "down_proj": projections.experts(source, (naming.down,), count),
    }
    for field_name, name in (("gate_up_proj_bias", naming.up_bias), ("down_proj_bias", naming.down_bias)):
        if name is not None and name in keys:
            tensors[field_name] = projections.vectors(source, name, count)
    return tensors


def _stacked(source: Source, order: str, family: str) -> dict[str, Any]:
    """Projections and biases that are one tensor each, in the family's order."""
    naming, keys = source.block.naming, source.block.keys
    stored = {name: projections.storage(source.block, name) for name in (naming.up[0], naming.down)}
    columns = _columns(source, order, family) and "mxfp4" not in stored.values()
    tensors: dict[str, Any] = {
        "gate_up_proj": projections.stack(source, naming.up[0], columns=columns),
        "down_proj": projections.stack(source, naming.down, columns=columns),
    }
    for field_name, name in (("gate_up_proj_bias", naming.up_bias), ("down_proj_bias", naming.down_bias)):
        if name is not None and name in keys:
            tensors[field_name] = source.tensor(source.key(name))
    return tensors


def _columns(source: Source, order: str, family: str) -> bool:
    """Whether stacks are stored by columns: the family says it, and the shapes must agree."""
    naming = source.block.naming
    up, down = (projections.stack_shape(source, name) for name in (naming.up[0], naming.down))
    mxfp4 = projections.storage(source.block, naming.up[0]) == "mxfp4"
    parts = 2 if naming.gated else 1
    fits = []
    if len(up) == len(down) == 3 and up[0] == down[0]:
        fits += ["rows"] if up[2] == down[1] and up[1] == parts * down[2] else []
        fits += ["columns"] if up[1] == down[2] and up[2] == parts * down[1] else []
    wanted = ["rows"] if mxfp4 else ["rows", "columns"] if order == "either" else [order]
    if agreed := [each for each in fits if each in wanted]:
        return agreed[0] == "columns"
    shapes = {"rows": f"(E, {parts}I, H) and (E, H, I)", "columns": f"(E, H, {parts}I) and (E, I, H)"}
    allowed = f"must be {' or '.join(shapes[each] for each in wanted)}, as family {family} stores them"
    key = source.key(naming.up[0])
    where = source.reader.shards.where.get(key, source.reader.shards.folder)
    raise BadCheckpoint(f"{where}: {key} and {naming.down} have shapes {up} and {down}: {allowed}")
