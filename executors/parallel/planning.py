"""From ids to transports: who sends what to whom."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors.parallel.agreement import Call, agreed, numbers
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
        owner: [T, K] the rank of each slot's expert; W for an empty slot.
        needed: [W, T] whether the rank has any of the token's experts.
        rows: [W] how many rows it is sent.
        slots: [W] how many slots.
    """

    owner: Tensor
    needed: Tensor
    rows: Tensor
    slots: Tensor


def sending(ids: Tensor, experts: ExpertMap) -> Sending:
    """What a rank with the ids [T, K] sends. A GPU is not waited for."""
    owner = owners(ids, experts)
    needed = torch.zeros(ids.shape[0], experts.ranks + 1, dtype=torch.bool, device=ids.device)
    needed = needed.scatter_(1, owner, True)[:, : experts.ranks].t()  # [W, T]
    each = owner.flatten() == torch.arange(experts.ranks, device=ids.device)[:, None]  # bincount would wait for a GPU
    return Sending(owner, needed, needed.sum(1), each.sum(1))


def _sizes(needs: Needs, device: torch.device, *counts: Tensor) -> Tensor:
    """[3 + n] what each rank tells the others."""
    return torch.cat([numbers(needs, device), *counts])


def _needs(sizes: list[list[int]]) -> Needs:
    """What any rank needs."""
    return Needs(*(any(own[place] for own in sizes) for place in range(3)))


def all_to_all(wire: Wire, call: Call, needs: Needs, ids: Tensor, experts: ExpertMap, by_rank: bool) -> AllToAll:
    """The transport of this rank's ids [T, K]. The host waits once, for all ranks' sizes.

    Raises:
        RankError: see `agreement.agreed`.
    """
    tokens, top_k = ids.shape
    owner, needed, *own_sizes = sending(ids, experts)
    told = agreed(wire, call, _sizes(needs, ids.device, *own_sizes))
    sizes = [own[3:] for own in told]  # of each rank: rows for each rank, then slots
    sent, received = sizes[wire.rank], [[own[wire.rank], own[wire.ranks + wire.rank]] for own in sizes]
    rows = sent[: wire.ranks], [own[0] for own in received]
    slots = sent[wire.ranks :], [own[1] for own in received]

    row_tokens = torch.nonzero_static(needed, size=sum(rows[0]))[:, 1]
    own_slots = torch.argsort(owner.flatten(), stable=True)[: sum(slots[0])]
    rank = owner.flatten()[own_slots]
    place = needed.long().cumsum(1) - 1  # [W, T] of a token's row among those of a rank
    first = numbers(experts.offsets, ids.device)[rank]
    heads = [place[rank, own_slots // top_k], ids.flatten()[own_slots] - first, own_slots % top_k]
    slot = wire.exchange(torch.stack(heads, dim=1).int(), *slots, SLOTS).long()
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
        _needs(told),
        rows,
        slots,
        by_rank,
    )


def all_reduce(wire: Wire, call: Call, needs: Needs, ids: Tensor, experts: ExpertMap, by_rank: bool) -> AllReduce:
    """The transport of all ranks' ids [T, K].

    Raises:
        RankError: see `agreement.agreed`.
    """
    told = agreed(wire, call, _sizes(needs, ids.device))
    own = experts.experts(wire.rank)
    local = torch.where((ids >= own.start) & (ids < own.stop), ids - own.start, -1)
    shape = ids.shape[0], ids.shape[1]
    return AllReduce(wire, wire.standing.calls - 1, shape, local.reshape(-1, 1), _needs(told), by_rank)
