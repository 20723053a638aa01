"""Loops over experts in 4 bits, as people write them: one expert after the other is decoded and multiplied.

The plain loop looks for each expert's tokens. The sorted loop sorts the slots once. The told loop is a sorted one that
knows beforehand how many slots each expert has. Nothing in it waits for the GPU, so a CUDA graph can capture it, and
Python's time is out of the comparison. Autograd keeps the decoded matrices for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from executors._bench.contenders import Contender
from executors._bench.layers import LORA_SCALING, BenchLayer
from executors._bench.routing import Batch
from moe_ref.types import MoEConfig

LOOP, SORTED, TOLD = KINDS = ("loop", "sorted-loop", "told-loop")

Decode = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class FourBitLinear:
    """One expert's projection.

    Attributes:
        decode: gives its matrix, [m, k].
        bias: [m] or None.
        lora_a, lora_b: its adapter, [r, k] and [m, r], or None.
        scaling: of the adapter.
    """

    decode: Decode
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = LORA_SCALING

    def __call__(self, rows: Tensor) -> Tensor:
        """Decodes, and multiplies; the adapter in its own dtype, as PEFT does."""
        out = self.product(rows)
        if self.lora_a is None or self.lora_b is None:
            return out
        added = F.linear(F.linear(rows.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return (out + self.scaling * added).to(out.dtype)

    def product(self, rows: Tensor) -> Tensor:
        """Without the adapter; autograd keeps the decoded matrix."""
        return F.linear(rows, self.decode(), self.bias)


Expert = tuple[FourBitLinear, FourBitLinear]


def names_of(prefix: str, device: torch.device) -> list[str]:
    """Names of the loops. The told one takes part on a GPU only: elsewhere it is the sorted one."""
    return [prefix + kind for kind in KINDS if kind != TOLD or device.type == "cuda"]


def loops_of(layer: BenchLayer, prefix: str, decoders: dict[str, list[Decode]]) -> list[Contender]:
    """The loops on a layer.

    Args:
        layer: its biases and adapters are taken.
        prefix: of their names.
        decoders: of both projections, one for each expert.
    """

    def built() -> list[Expert]:
        pairs = [_linears(layer, name, decoders[f"{name}_proj"]) for name in ("gate_up", "down")]
        return list(zip(*pairs, strict=True))

    once = None if layer.storage.rank else built()  # adapters: views, whose gradients belong to one call
    config, sizes = layer.shape.config, Sizes(layer.shape.experts)
    calls: dict[str, Callable[[Batch], Tensor]] = {
        LOOP: lambda batch: loop(batch, once or built(), config),
        SORTED: lambda batch: sorted_loop(batch, once or built(), config, sizes.read(batch)),
        TOLD: lambda batch: sorted_loop(batch, once or built(), config, sizes.told(batch)),
    }
    device = layer.weights().gate_up_proj.device
    return [Contender(name, False, calls[name.removeprefix(prefix)]) for name in names_of(prefix, device)]


class Sizes:
    """How many slots each of so many experts has."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._told: WeakKeyDictionary[Batch, list[int]] = WeakKeyDictionary()

    def read(self, batch: Batch) -> list[int]:
        """Reads them on the host, and waits for the GPU."""
        return torch.bincount(batch.topk_ids.flatten(), minlength=self.experts).tolist()

    def told(self, batch: Batch) -> list[int]:
        """Reads them at a batch's first call only."""
        if batch not in self._told:
            self._told[batch] = self.read(batch)
        return self._told[batch]


def loop(batch: Batch, experts: list[Expert], config: MoEConfig) -> Tensor:
    """Looks for the tokens of each expert that is hit, and adds what it makes of them to the result."""
    y = torch.zeros_like(batch.x)
    for index in torch.unique(batch.topk_ids).tolist():
        tokens, slots = torch.where(batch.topk_ids == index)
        up, down = experts[index]
        out = down(activate(up(batch.x[tokens]), config)) * batch.topk_weights[tokens, slots, None]
        y.index_add_(0, tokens, out.to(y.dtype))
    return y


def sorted_loop(batch: Batch, experts: list[Expert], config: MoEConfig, sizes: list[int]) -> Tensor:
    """Sorts the slots by expert once, and works on slices of so many rows."""

    def work(rows: Tensor) -> Tensor:
        slices = zip(torch.split(rows, sizes), experts, strict=True)
        return torch.cat([down(activate(up(own), config)) for own, (up, down) in slices if len(own)])

    return on_sorted(batch, work)


def on_sorted(batch: Batch, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Hands the rows of all slots over, sorted by expert, and sums up what comes back for each token."""
    tokens, top_k = batch.topk_ids.shape
    order = batch.topk_ids.flatten().argsort(stable=True)
    of_slots = work(batch.x[order // top_k])[order.argsort()].view(tokens, top_k, -1)
    return (of_slots * batch.topk_weights[..., None]).sum(1).to(batch.x.dtype)


def activate(z: Tensor, config: MoEConfig) -> Tensor:
    """Swiglu, as a model's own code has it."""
    gate, up = (z[..., ::2], z[..., 1::2]) if config.gate_up_layout == "interleaved" else z.chunk(2, dim=-1)
    if config.limit is None:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=config.limit), up.clamp(-config.limit, config.limit)
    return gate * torch.sigmoid(config.alpha * gate) * (up + config.up_offset)


def _linears(layer: BenchLayer, name: str, decoders: list[Decode]) -> list[FourBitLinear]:
    """A projection of all experts, with biases, and with adapters as views whose gradients go to one stack."""
    nothing: list[None] = [None] * len(decoders)
    bias: Any = layer.frozen.get(f"{name}_proj_bias", nothing)
    a, b = (
        layer.parameters[factor].unbind() if factor in layer.parameters else nothing
        for factor in (f"{name}_lora_a", f"{name}_lora_b")
    )
    return [FourBitLinear(*parts) for parts in zip(decoders, bias, a, b, strict=True)]
