"""The peers in 4 bits: what people run today on weights that bitsandbytes quantised.

Two loops decode one expert after the other: the plain one looks for each expert's tokens, the other sorts them once.
Transformers' experts functions run on bitsandbytes' parametrization, which decodes the whole stack at every access. All
of them multiply decoded matrices, and autograd keeps those for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from executors._cli.bench_contenders import Contender
from executors._cli.bench_layers import LORA_SCALING, BenchLayer
from executors._cli.bench_nf4 import bitsandbytes_version, quant_state
from executors._cli.bench_peers import PREFIX, experts_module, peers_version
from executors._cli.bench_routing import Batch
from moe_ref.types import MoEConfig, NF4Tensor

LOOPS = LOOP, SORTED_LOOP = ("bnb:loop", "bnb:sorted-loop")
ON_STACKS = ("grouped_mm", "eager")
SUFFIX = "+bnb"
STACK = PREFIX + "grouped_mm" + SUFFIX  # decodes the whole stack in every call
NO_ADAPTERS = "no adapters: PEFT raises NoMatchingPeftModuleError on a parametrised stack"
SMALLEST_NESTED_BLOCK = 32  # that bitsandbytes decodes


def peers_in_4_bits(layer: BenchLayer) -> list[Contender]:
    """The loops and the parametrised stacks, usable or with the reason why not."""
    on_stacks = [PREFIX + name + SUFFIX for name in ON_STACKS]
    if bitsandbytes_version() is None:
        return [Contender(name, False, reason="bitsandbytes is not installed") for name in (*LOOPS, *on_stacks)]
    if layer.form.rank:
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


@dataclass(frozen=True, eq=False)
class FourBitLinear:
    """One expert's projection.

    Attributes:
        packed: its bytes.
        state: its quant state.
        transposed: whether it is stored as [k, m].
        bias: [m] or None.
        lora_a, lora_b: its adapter, [r, k] and [m, r], or None.
    """

    packed: Tensor
    state: Any
    transposed: bool
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Decodes, and multiplies."""
        from bitsandbytes.functional import dequantize_4bit

        matrix = dequantize_4bit(self.packed, self.state)
        out = F.linear(rows, matrix.mT if self.transposed else matrix, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return out
        return out + LORA_SCALING * F.linear(F.linear(rows, self.lora_a), self.lora_b)


Expert = tuple[FourBitLinear, FourBitLinear]


def _loops(layer: BenchLayer) -> list[Contender]:
    try:
        up, down = (_own_bytes(layer.frozen[name]) for name in ("gate_up_proj", "down_proj"))
    except ValueError as error:
        return [Contender(name, False, reason=str(error)) for name in LOOPS]

    def built() -> list[Expert]:
        pairs = [_linears(layer, name, parts) for name, parts in (("gate_up", up), ("down", down))]
        return list(zip(*pairs, strict=True))

    once = None if layer.form.rank else built()  # adapters: views, whose gradients belong to one call
    config = layer.shape.config
    return [
        Contender(LOOP, False, lambda batch: loop(batch, once or built(), config)),
        Contender(SORTED_LOOP, False, lambda batch: sorted_loop(batch, once or built(), config)),
    ]


def loop(batch: Batch, experts: list[Expert], config: MoEConfig) -> Tensor:
    """Looks for the tokens of each expert that is hit, and adds what it makes of them to the result."""
    y = torch.zeros_like(batch.x)
    for index in torch.unique(batch.topk_ids).tolist():
        up, down = experts[index]
        tokens, slots = torch.where(batch.topk_ids == index)
        out = down(_activate(up(batch.x[tokens]), config)) * batch.topk_weights[tokens, slots, None]
        y.index_add_(0, tokens, out.to(y.dtype))
    return y


def sorted_loop(batch: Batch, experts: list[Expert], config: MoEConfig) -> Tensor:
    """Sorts the slots by expert once, reads the sizes of all groups once, and works on slices."""
    tokens, top_k = batch.topk_ids.shape
    order = batch.topk_ids.flatten().argsort(stable=True)
    sizes = torch.bincount(batch.topk_ids.flatten(), minlength=len(experts)).tolist()
    rows = torch.split(batch.x[order // top_k], sizes)
    outs = [down(_activate(up(own), config)) for own, (up, down) in zip(rows, experts, strict=True) if len(own)]
    of_slots = torch.cat(outs)[order.argsort()].view(tokens, top_k, -1)
    return (of_slots * batch.topk_weights[..., None]).sum(1).to(batch.x.dtype)


def _activate(z: Tensor, config: MoEConfig) -> Tensor:
    gate, up = (z[..., ::2], z[..., 1::2]) if config.gate_up_layout == "interleaved" else z.chunk(2, dim=-1)
    if config.limit is None:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=config.limit), up.clamp(-config.limit, config.limit)
    return gate * torch.sigmoid(config.alpha * gate) * (up + config.up_offset)


def _own_bytes(stack: Any) -> list[tuple[Tensor, Any]]:
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


def _linears(layer: BenchLayer, name: str, parts: list[tuple[Tensor, Any]]) -> list[FourBitLinear]:
    """A projection of all experts, with biases, and with adapters as views whose gradients go to one stack."""
    nothing: list[Any] = [None] * len(parts)
    bias: Any = layer.frozen.get(f"{name}_proj_bias", nothing)
    a, b = (
        layer.parameters[factor].unbind() if factor in layer.parameters else nothing
        for factor in (f"{name}_lora_a", f"{name}_lora_b")
    )
    return [
        FourBitLinear(packed, state, layer.shape.transposed, *trained)
        for (packed, state), *trained in zip(parts, bias, a, b, strict=True)
    ]
