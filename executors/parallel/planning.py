"""From ids to transports: who sends what to whom."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors.parallel.agreement import Call, agreed, numbers, same
from executors.parallel.experts import ExpertMap
from executors.parallel.transport import SLOTS, AllReduce, AllToAll, Needs
from executors.parallel.waiting import Wire


def owners(ids: Tensor, experts: ExpertMap) -> Tensor:
    """[T, K] the rank of each slot's expert; W for an empty slot (R7)."""
    ends = numbers(experts.offsets[1:], ids.device)
    ranks = torch.bucketize(ids.long().contiguous(), ends, right=True)
    return torch.where((ids < 0) | (ids >= experts.num_experts), experts.ranks, ranks)


class Sending(NamedTuple):
    """What a rank sends under "all_to_all".

    Attributes:
        owner: [T K] the rank of each slot's expert; W for an empty slot.
        needed: [W, T] whether each rank has any of the token's experts: then it is sent the token's row.
        slots: [W] how many slots each rank is sent.
    """

    owner: Tensor
    needed: Tensor
    slots: Tensor


def sending(ids: Tensor, experts: ExpertMap) -> Sending:
    """What a rank with the ids [T, K] sends. A GPU is not waited for."""
    owner = owners(ids, experts)
    needed = torch.zeros(ids.shape[0], experts.ranks + 1, dtype=torch.bool, device=ids.device)
    needed = needed.scatter_(1, owner, True)[:, : experts.ranks].t()
    owner = owner.flatten()
    each = owner == torch.arange(experts.ranks, device=ids.device)[:, None]  # bincount would wait for a GPU
    return Sending(owner, needed, each.sum(1))


def all_to_all(wire: Wire, call: Call, needs: Needs, ids: Tensor, experts: ExpertMap, by_rank: bool) -> AllToAll:
    """The transport of this rank's ids [T, K]. The host waits once, for all ranks' sizes, or not, if they have a bound.

    Raises:
        RankError: see `agreement.agreed` and `agreement.same`.
    """
    (tokens, top_k), ranks = ids.shape, wire.ranks
    owner, needed, each = sending(ids, experts)
    place = needed.long().cumsum(1) - 1  # [W, T] of a token's row among those of a rank
    if call.max_slots:
        same(wire, call, needs, each)
        rows = slots = ([call.max_slots] * ranks, [call.max_slots] * ranks)
        row_tokens = _up_to(call.max_slots, needed, place)
        own_slots = _first(call.max_slots, owner, each)
    else:
        told = agreed(wire, call, needs, needed.sum(1), each)
        needs, rows, slots = Needs(*told.needs), told.rows, told.slots
        row_tokens = torch.nonzero_static(needed, size=sum(rows[0]))[:, 1]
        own_slots = torch.argsort(owner, stable=True)[: sum(slots[0])]
    heads = _heads(own_slots, owner, place, ids, numbers(experts.offsets, ids.device))
    slot = wire.exchange(heads, *slots, SLOTS)().long()
    starts = numbers([0, *rows[1]], ids.device).cumsum(0)[:-1]
    starts = starts.repeat_interleave(numbers(slots[1], ids.device), output_size=sum(slots[1]))
    return AllToAll(
        wire,
        wire.standing.calls - 1,
        (tokens, top_k),
        row_tokens,
        own_slots,
        slot[:, 0] + starts,
        slot[:, 2],
        slot[:, 1:2].contiguous(),
        needs,
        rows,
        slots,
        by_rank,
        bool(call.max_slots),
    )


def _up_to(most: int, needed: Tensor, place: Tensor) -> Tensor:
    """[W most] tokens that each rank needs, in increasing order, each rank's filled up with token T."""
    ranks, tokens = needed.shape
    filled = torch.full((ranks, most + 1), tokens, device=needed.device)
    every = torch.arange(tokens, device=needed.device).expand(ranks, tokens)
    return filled.scatter_(1, torch.where(needed, place, most).clamp(max=most), every)[:, :most].flatten()


def _first(most: int, owner: Tensor, each: Tensor) -> Tensor:
    """[W most] slots of each rank in increasing order, each rank's filled up with slot T K."""
    order = torch.cat([torch.argsort(owner, stable=True), numbers([len(owner)], owner.device)])
    place = torch.arange(most, device=owner.device)
    found = (each.cumsum(0) - each)[:, None] + place
    return order[torch.where(place < each[:, None], found, len(owner))].flatten()


def _heads(own_slots: Tensor, owner: Tensor, place: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """[slots sent, 3] int32: the row among those of its rank, the expert there, and k; what fills up has expert -1."""
    top_k = ids.shape[1]
    real = own_slots < len(owner)
    rank = torch.cat([owner, owner.new_zeros(1)])[own_slots]
    row = torch.cat([place, place.new_zeros(place.shape[0], 1)], dim=1)[rank, own_slots // top_k]
    expert = torch.cat([ids.flatten(), ids.new_zeros(1)])[own_slots] - offsets[rank]
    return torch.stack([row, torch.where(real, expert, -1), own_slots % top_k], dim=1).int()


def all_reduce(wire: Wire, call: Call, needs: Needs, ids: Tensor, experts: ExpertMap, by_rank: bool) -> AllReduce:
    """The transport of all ranks' ids [T, K].

    Raises:
        RankError: see `agreement.same`.
    """
    same(wire, call, needs, numbers([], ids.device))
    own = experts.experts(wire.rank)
    local = torch.where((ids >= own.start) & (ids < own.stop), ids - own.start, -1)
    shape = ids.shape[0], ids.shape[1]
    return AllReduce(wire, wire.standing.calls - 1, shape, local.reshape(-1, 1), needs, by_rank)
