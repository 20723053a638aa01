"""The peers in NF4 and FP4: what people run today on weights that bitsandbytes quantised.

Loops decode one expert after the other by bitsandbytes' kernel (`executors._bench.peers.loops`). Transformers' experts
functions run on bitsandbytes' parametrization, which decodes the whole stack at every access. All of them multiply
decoded matrices, and autograd keeps those for the backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from executors._bench.contenders import Contender
from executors._bench.layers import BenchLayer
from executors._bench.mxfp4 import torch_loops
from executors._bench.peers.loops import Decode, loops_of, names_of
from executors._bench.peers.transformers import PREFIX, experts_module, peers_version
from executors._bench.quantised import bitsandbytes_version, quant_state
from moe_ref.types import MXFP4Tensor, NF4Tensor

LOOPS = "bnb:"  # their prefix
ON_STACKS = ("grouped_mm", "eager")
SUFFIX = "+bnb"
STACK = PREFIX + "grouped_mm" + SUFFIX  # decodes the whole stack in every call
NO_ADAPTERS = "no adapters: PEFT raises NoMatchingPeftModuleError on a parametrised stack"
NO_MXFP4 = "bitsandbytes has no MXFP4"
SMALLEST_NESTED_BLOCK = 32  # that bitsandbytes decodes


def peers_in_4_bits(layer: BenchLayer) -> list[Contender]:
    """The loops and the parametrised stacks, usable or with the reason why not."""
    on_stacks = [PREFIX + name + SUFFIX for name in ON_STACKS]
    loops = names_of(LOOPS, layer.weights().gate_up_proj.device)
    if isinstance(layer.frozen["gate_up_proj"], MXFP4Tensor):
        left_out = [Contender(name, False, reason=NO_MXFP4) for name in (*loops, *on_stacks)]
        return torch_loops(layer) + left_out
    if bitsandbytes_version() is None:
        return [Contender(name, False, reason="bitsandbytes is not installed") for name in (*loops, *on_stacks)]
    if layer.storage.rank:
        stacks = [Contender(name, False, reason=NO_ADAPTERS) for name in on_stacks]
    elif peers_version() is None:
        stacks = [Contender(name, False, reason="transformers is not installed") for name in on_stacks]
    else:
        stacks = [_on_stack(layer, name) for name in ON_STACKS]
    return _loops(layer) + stacks


def _on_stack(layer: BenchLayer, implementation: str) -> Contender:
    name = PREFIX + implementation + SUFFIX
    try:
        module = parametrised_module(layer, implementation)
    except (ImportError, AttributeError) as error:
        return Contender(name, False, reason=f"not in these versions: {' '.join(str(error).split())}")
    return Contender(name, False, lambda batch: module(batch.x, batch.topk_ids, batch.topk_weights))


def parametrised_module(layer: BenchLayer, implementation: str) -> Any:
    """The model's experts module with bitsandbytes' parametrization on the layer's own bytes.

    Raises:
        ImportError, AttributeError: the installed versions have no such module, class or parametrization.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    module = experts_module(layer, implementation)
    for name, value in layer.frozen.items():
        if isinstance(value, NF4Tensor):
            setattr(module, name, torch.nn.Parameter(value.packed[:, None], requires_grad=False))
            described = quant_state(value).as_dict(packed=True)
            replace_parameter_4bit_prequantized(module, name, described, value.packed.device)
    return module


def _loops(layer: BenchLayer) -> list[Contender]:
    transposed, decoders = layer.shape.transposed, {}
    try:
        for name in ("gate_up_proj", "down_proj"):
            parts = own_bytes(layer.frozen[name])
            decoders[name] = [_decoder(packed, state, transposed) for packed, state in parts]
    except ValueError as error:
        names = names_of(LOOPS, layer.weights().gate_up_proj.device)
        return [Contender(name, False, reason=str(error)) for name in names]
    return loops_of(layer, LOOPS, decoders)


def _decoder(packed: Tensor, state: Any, transposed: bool) -> Decode:
    """Gives one expert's [m, k], which may be stored as [k, m]."""

    def decode() -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        matrix = dequantize_4bit(packed, state)
        return matrix.mT if transposed else matrix

    return decode


def own_bytes(stack: Any) -> list[tuple[Tensor, Any]]:
    """Each expert's part of a stack: bytes, and a quant state of its own.

    Raises:
        ValueError: the experts share a nested scale.
    """
    count = stack.shape[0]
    blocks, size = stack.absmax.shape[0] // count, stack.packed.shape[0] // count
    if stack.nested_absmax is not None:
        stack = _with_own_nested_scales(stack, blocks)
    found = []
    for index in range(count):
        part = replace(
            stack,
            packed=stack.packed[index * size : (index + 1) * size],
            absmax=stack.absmax[index * blocks : (index + 1) * blocks],
            shape=stack.shape[1:],
        )
        if stack.nested_absmax is not None:
            nested = blocks // stack.nested_blocksize
            part = replace(part, nested_absmax=stack.nested_absmax[index * nested : (index + 1) * nested])
        found.append((part.packed[:, None], quant_state(part)))
    return found


def _with_own_nested_scales(stack: NF4Tensor, blocks: int) -> NF4Tensor:
    """The same numbers in nested blocks so small that none straddles two experts."""
    assert stack.nested_absmax is not None
    smaller = gcd(blocks, stack.nested_blocksize)
    if smaller < SMALLEST_NESTED_BLOCK:
        raise ValueError(f"{blocks} scales for each expert: must be a multiple of {SMALLEST_NESTED_BLOCK}")
    repeated = stack.nested_absmax.repeat_interleave(stack.nested_blocksize // smaller)
    return replace(stack, nested_absmax=repeated, nested_blocksize=smaller)
