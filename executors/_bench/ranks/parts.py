"""What a rank has of a layer and of a batch, and how the parts come together again to be judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from executors import parallel
from executors._bench.layers import BenchLayer, Shape
from executors._bench.routing import Batch
from moe_ref.types import PackedTensor


@dataclass(frozen=True, eq=False)
class Part:
    """What a rank has of a layer.

    Attributes:
        rank: this one's number.
        local: its own experts; leaves of their own.
        experts: which rank has which.
        whole: all experts, on the first rank; their memory is that of its own experts too.
    """

    rank: int
    local: BenchLayer
    experts: parallel.ExpertMap
    whole: BenchLayer | None

    @property
    def shape(self) -> Shape:
        """Of the whole layer."""
        return replace(self.local.shape, experts=self.experts.num_experts)

    def counts(self) -> list[int]:
        """[W] how many experts each rank has."""
        return [len(self.experts.experts(rank)) for rank in range(self.experts.ranks)]


def part_of(layer: BenchLayer) -> Part:
    """This rank's part of a layer that every rank has drawn."""
    weights, experts = parallel.shard(layer.weights())
    rank = dist.get_rank()
    own = experts.experts(rank)

    def stored(name: str, value: Any) -> Any:
        """This rank's experts of a stack, in the model's order; but on the first rank in memory of their own."""
        if isinstance(value, PackedTensor):
            found = layer.canonical(name, getattr(weights, name))
        else:
            found = value.detach()[own.start : own.stop]
        return found if rank == 0 else found.map(Tensor.clone) if isinstance(found, PackedTensor) else found.clone()

    local = replace(
        layer,
        shape=replace(layer.shape, experts=len(own)),
        parameters={name: torch.nn.Parameter(stored(name, value)) for name, value in layer.parameters.items()},
        frozen={name: stored(name, value) for name, value in layer.frozen.items()},
        decoded={},
    )
    return Part(rank, local, experts, layer if rank == 0 else None)


def token_counts(tokens: int, ranks: int) -> list[int]:
    """[W] tokens split evenly; the first ranks have one more where W does not divide T."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


def rows_of(batch: Batch, rank: int, ranks: int) -> Batch:
    """A rank's tokens of a batch, as leaves."""
    counts = token_counts(len(batch.x), ranks)
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    where = batch.judged[(batch.judged >= own.start) & (batch.judged < own.stop)] - own.start
    return Batch(
        batch.x.detach()[own].clone().requires_grad_(),
        batch.dy[own],
        batch.topk_ids[own],
        batch.topk_weights.detach()[own].clone().requires_grad_(),
        where,
    )


def collected(value: Tensor, counts: Sequence[int], rank: int) -> Tensor | None:
    """Rows of all ranks in the order of ranks, on the first one; None on the others.

    Args:
        value: [counts[rank], ...] this rank's.
        counts: [W] how many rows each has.
        rank: this one's number.
    """
    if rank:
        if value.numel():
            dist.send(value.detach().contiguous().view(torch.uint8), 0)
        return None
    pieces = [value.detach()]
    for other in range(1, len(counts)):
        piece = value.new_empty((counts[other], *value.shape[1:]))
        if piece.numel():
            dist.recv(piece.view(torch.uint8), other)
        pieces.append(piece)
    return torch.cat(pieces)
