"""Layers of the benchmark in MXFP4, and the loops that decode them: bitsandbytes does not know this format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from executors._bench.contenders import Contender
from executors._bench.layers import BenchLayer, Storage
from executors._bench.peers.loops import Decode, loops_of
from executors._decode import decode_expert
from executors.mxfp4 import quantize_tensor
from moe_ref.types import MXFP4Tensor, PackedTensor

PREFIX = "torch:"  # of the loops: torch decodes


def in_mxfp4(layer: BenchLayer, weight_bytes: float, progress: Callable[[int, int], None]) -> BenchLayer:
    """The layer with both projections in MXFP4, and nothing in it trained.

    Blocks run along the dimension that is summed over. That is the last one in memory, as in gpt-oss' checkpoints,
    whatever the order of the layer's dense stacks.

    Args:
        layer: with dense projections.
        weight_bytes: of one number.
        progress: called with (experts quantised, experts in all).
    """
    stacks = {name: value.detach() for name, value in layer.parameters.items()}
    dense = {name: layer.canonical(name, stacks.pop(name)) for name in ("gate_up_proj", "down_proj")}
    parts: dict[str, list[MXFP4Tensor]] = {name: [] for name in dense}
    for index in range(layer.shape.experts):
        for name, stack in dense.items():
            parts[name].append(quantize_tensor(stack[index]))
        progress(index + 1, layer.shape.experts)
    frozen: dict[str, Tensor | PackedTensor] = {name: _stacked(found) for name, found in parts.items()}
    frozen.update(stacks)
    return BenchLayer(replace(layer.shape, transposed=False), {}, frozen, Storage(weight_bytes, frozen=True))


def _stacked(parts: list[MXFP4Tensor]) -> MXFP4Tensor:
    blocks, scales = (torch.stack([getattr(part, name) for part in parts]) for name in ("blocks", "scales"))
    return replace(parts[0], blocks=blocks, scales=scales)


def torch_loops(layer: BenchLayer) -> list[Contender]:
    """The loops, which decode one expert after the other with torch's operators."""
    found: dict[str, list[Decode]] = {}
    for name in ("gate_up_proj", "down_proj"):
        stack = layer.frozen[name]
        assert isinstance(stack, PackedTensor)
        found[name] = [_decoder(stack, index) for index in range(layer.shape.experts)]
    return loops_of(layer, PREFIX, found)


def _decoder(stack: PackedTensor, index: int) -> Decode:
    return lambda: decode_expert(stack, index)
