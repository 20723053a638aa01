"""Which rank has which experts, and a layer's parameters by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from executors.parallel.groups import global_rank, group_of
from executors.parallel.packed import joined, part_of
from executors.parallel.waiting import RankError
from moe_ref.types import PER_EXPERT, MoEWeights

ROUTED = ("expert_scale",)  # has a number for each expert, but belongs to routing, which every rank does


@dataclass(frozen=True)
class ExpertMap:
    """Experts in consecutive blocks, one for each rank: those of `torch.chunk`, as DTensor's ``Shard(0)`` has them.

    Attributes:
        num_experts: E, of all ranks.
        ranks: W. Where it does not divide E, the last ranks have fewer experts, or none.
    """

    num_experts: int
    ranks: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "ranks"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r:.60}: must be an integer of at least 1")

    @property
    def offsets(self) -> tuple[int, ...]:
        """[W + 1] rank r has experts offsets[r] to offsets[r + 1] - 1."""
        size = -(-self.num_experts // self.ranks)
        return tuple(min(rank * size, self.num_experts) for rank in range(self.ranks + 1))

    def experts(self, rank: int) -> range:
        """The experts of a rank."""
        return range(*self.offsets[rank : rank + 2])


def shard(weights: MoEWeights, mesh_or_group: Any = None) -> tuple[MoEWeights, ExpertMap]:
    """This rank's part of a layer: views of its parameters, not copies.

    What routing uses stays whole: K and groups of the configuration, selection bias and expert scales. So does a norm
    after each expert, which all share. DTensors that are placed as ``Shard(0)`` on one mesh dimension are this rank's
    part already, and are taken as they are. Blocks of nested statistics that straddle ranks are decoded to plain ones,
    which has the same numbers (Q3).

    Args:
        weights: the whole layer, the same on every rank.
        mesh_or_group: a process group, or a mesh of one dimension; None is the default group.

    Returns:
        The part and the map; both are the same functions of E and W on every rank.

    Raises:
        ValueError: in one line: blocks of 4-bit codes straddle ranks, or a DTensor is placed in another way.
    """
    group = group_of(mesh_or_group)
    experts = ExpertMap(weights.num_experts, dist.get_world_size(group))
    own = experts.experts(dist.get_rank(group))
    changed: dict[str, Any] = {}
    for name, value in weights.parameters().items():
        if name in PER_EXPERT and name not in ROUTED:
            changed[name] = _local(name, value, own, experts.ranks)
    for name, tensor in weights.packed().items():
        changed[name] = part_of(name, tensor, own)
    return weights.with_parameters(changed), experts


def _local(name: str, value: Any, own: range, ranks: int) -> Tensor:
    placements = getattr(value, "placements", None)
    if placements is None:
        return value[own.start : own.stop]
    sharded = [place for place in placements if not place.is_replicate()]
    if len(placements) != 1 or not all(place.is_shard(0) for place in sharded) or value.device_mesh.size() != ranks:
        allowed = f"must be (Shard(dim=0),) or (Replicate(),) on a mesh of {ranks} ranks"
        raise ValueError(f"{name} is a DTensor placed as {tuple(placements)} on {value.device_mesh}: {allowed}")
    if sharded:
        return value.to_local()
    from torch.distributed.tensor import Partial

    partial = [Partial()]  # each rank has the gradient of its own experts alone
    return value.to_local(grad_placements=partial)[own.start : own.stop]


def gather(weights: MoEWeights, mesh_or_group: Any = None, *, num_experts: int) -> MoEWeights:
    """The whole layer on every rank, from their parts: the inverse of `shard`. It copies, and has no gradient.

    Args:
        weights: this rank's part.
        mesh_or_group: as of `shard`.
        num_experts: E of the whole layer.

    Raises:
        ValueError: this rank's part does not have as many experts as the map gives it.
        RankError: another rank's does not.
    """
    group = group_of(mesh_or_group)
    experts = ExpertMap(num_experts, dist.get_world_size(group))
    _check_parts(weights, experts, group)
    changed: dict[str, Any] = {}
    for name, value in weights.parameters().items():
        if name in PER_EXPERT and name not in ROUTED:
            changed[name] = _joined(value.detach(), experts, group)
    for name, tensor in weights.packed().items():
        changed[name] = joined(tensor, num_experts, lambda array: _pieces(array, group))
    return weights.with_parameters(changed)


def _check_parts(weights: MoEWeights, experts: ExpertMap, group: Any) -> None:
    """Checks all ranks' parts on all ranks, so that none waits for one that has raised."""
    said: list[Any] = [None] * experts.ranks
    try:
        check_part(weights, experts, dist.get_rank(group))
    except ValueError as error:
        dist.all_gather_object(said, str(error), group=group)
        raise
    dist.all_gather_object(said, "", group=group)
    wrong = [f"rank {rank} raised ValueError: {own}" for rank, own in enumerate(said) if own]
    if wrong:
        raise RankError("; ".join(wrong))


def check_part(weights: MoEWeights, experts: ExpertMap, rank: int) -> None:
    """Checks that a rank's part has the experts that the map gives it.

    Raises:
        ValueError: in one line.
    """
    found, expected = weights.num_experts, len(experts.experts(rank))
    if found != expected:
        said = f"of {experts.num_experts} experts on {experts.ranks} ranks, rank {rank} has {expected}"
        raise ValueError(
            f"gate_up_proj.shape={tuple(weights.gate_up_proj.shape)}: must have {expected} experts: {said}"
        )


def _joined(value: Tensor, experts: ExpertMap, group: Any) -> Tensor:
    """One stack of all ranks' stacks, whose sizes the map tells."""
    out = value.new_empty((experts.num_experts, *value.shape[1:]))
    for rank in range(experts.ranks):
        own = experts.experts(rank)
        piece = value.contiguous() if rank == dist.get_rank(group) else torch.empty_like(out[own.start : own.stop])
        if piece.numel():
            dist.broadcast(piece.view(torch.uint8), src=global_rank(group, rank), group=group)
        out[own.start : own.stop] = piece
    return out


def _pieces(array: Tensor, group: Any) -> list[Tensor]:
    """An array of each rank, of any length."""
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, tuple(array.shape), group=group)
    pieces = []
    for rank, shape in enumerate(sizes):
        piece = array.contiguous() if rank == dist.get_rank(group) else array.new_empty(shape)
        if piece.numel():
            dist.broadcast(piece.view(torch.uint8), src=global_rank(group, rank), group=group)
        pieces.append(piece)
    return pieces
