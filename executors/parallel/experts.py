"""Which rank has which experts, and a layer's parameters by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from executors.parallel.agreement import told
from executors.parallel.groups import group_of
from executors.parallel.packed import joined, part_of
from executors.parallel.waiting import RankError, Wire, check_timeout, on_host
from moe_ref.types import PER_EXPERT, MoEWeights

GATHER = "where parts are gathered"
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


def gather(weights: MoEWeights, mesh_or_group: Any = None, *, num_experts: int, timeout: float = 120.0) -> MoEWeights:
    """The whole layer on every rank, from their parts: the inverse of `shard`. It copies, and has no gradient.

    Args:
        weights: this rank's part.
        mesh_or_group: as of `shard`.
        num_experts: E of the whole layer.
        timeout: seconds that a rank waits for the others at each step.

    Raises:
        ValueError: this rank's part does not have as many experts as the map gives it; a timeout of no seconds.
        RankError: another rank's does not, or a rank does not come.
    """
    check_timeout(timeout)
    wire = Wire(group_of(mesh_or_group), float(timeout))
    experts = ExpertMap(num_experts, wire.ranks)
    _check_parts(weights, experts, wire)
    with wire.together():
        changed: dict[str, Any] = {}
        for name, value in weights.parameters().items():
            if name in PER_EXPERT and name not in ROUTED:
                shapes = [(len(experts.experts(rank)), *value.shape[1:]) for rank in range(experts.ranks)]
                changed[name] = torch.cat(_pieces(value.detach(), shapes, wire))
        for name, tensor in weights.packed().items():
            changed[name] = joined(tensor, num_experts, lambda array: _pieces(array, _shapes(array, wire), wire))
        return weights.with_parameters(changed)


def _check_parts(weights: MoEWeights, experts: ExpertMap, wire: Wire) -> None:
    """Checks all ranks' parts on all ranks, so that none waits for one that has raised."""
    own = None
    try:
        check_part(weights, experts, wire.rank)
    except ValueError as error:
        own = error
    with wire.together():
        wrong = enumerate(told(wire, "" if own is None else str(own), GATHER))
    said = [f"rank {rank} raised ValueError: {words}" for rank, words in wrong if words]
    if said:
        raise own if own is not None else RankError("; ".join(said))


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


def _shapes(array: Tensor, wire: Wire) -> list[tuple[int, ...]]:
    """Of an array of each rank."""
    return [tuple(shape) for shape in told(wire, array.shape, GATHER)]


def _pieces(array: Tensor, shapes: list[tuple[int, ...]], wire: Wire) -> list[Tensor]:
    """An array of each rank, of these shapes."""
    pieces = []
    for rank, shape in enumerate(shapes):
        piece = array.contiguous() if rank == wire.rank else array.new_empty(shape)
        if piece.numel() and wire.ranks > 1:
            source = dist.get_global_rank(wire.group, rank)
            work = dist.broadcast(piece.view(torch.uint8), src=source, group=wire.group, async_op=True)
            wire.wait(work, GATHER, on_host(piece))
        pieces.append(piece)
    return pieces
