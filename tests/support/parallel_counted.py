"""The bytes that a process of a cluster gives to torch.distributed, and gets from it, in a call of ExpertParallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from executors.parallel import ExpertParallel, shard
from moe_ref.types import MoEConfig, MoEWeights

INTERMEDIATE = 8

Sent = tuple[list[int], list[int]]  # bytes to each rank and from each, but itself


def counted(
    group: Any,
    ids: Sequence[Tensor],
    dispatch: str,
    returns: str,
    experts: int,
    hidden: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    max_slots: int | None = None,
) -> tuple[list[Sent], list[Sent]]:
    """The exchanges of a call and of its backward pass, one by one.

    Args:
        group: of the ranks.
        ids: [T, K] of each; under "all_reduce" the first is that of all.
        dispatch, returns: options of the executor.
        experts: E.
        hidden: H.
        dtypes: of x and projections, and of the slots' weights.
        max_slots: option of the executor.
    """
    own = ids[dist.get_rank(group) if dispatch == "all_to_all" else 0]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtypes[0]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    whole = MoEWeights(
        normal(experts, 2 * INTERMEDIATE, hidden),
        normal(experts, hidden, INTERMEDIATE),
        config=MoEConfig(own.shape[1]),
    )
    part, _ = shard(whole, group)
    options = {"num_experts": experts, "max_slots": max_slots}
    executor = ExpertParallel("native", group, dispatch, returns, **options)  # type: ignore[arg-type]
    x, topk_weights = normal(len(own), hidden), normal(*own.shape, dtype=dtypes[1])
    with counting(group) as found:
        y = executor.experts(x, topk_ids=own, topk_weights=topk_weights, weights=part)
        forward = list(found)
        y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
    return forward, found[len(forward) :]


@contextmanager
def counting(group: Any) -> Iterator[list[Sent]]:
    """Lets every collective through, and notes what it takes to and from each other rank."""
    rank, found = dist.get_rank(group), list[Sent]()
    exchange = dist.all_to_all_single

    def note(sent: list[int], received: list[int]) -> None:
        sent[rank] = received[rank] = 0
        found.append((sent, received))

    def all_to_all_single(there: Tensor, here: Tensor, receive: list[int], send: list[int], **options: Any) -> Any:
        note(*([own.numel() * own.element_size() for own in value.split(sizes)] for value, sizes in
               ((here, send), (there, receive))))  # fmt: skip
        return exchange(there, here, receive, send, **options)

    changed = {"all_to_all_single": all_to_all_single}
    with (
        mock.patch.multiple(dist, **changed),
        refusing("all_gather", "all_reduce", "reduce_scatter_tensor", "broadcast", "send"),
    ):
        yield found


@contextmanager
def refusing(*names: str) -> Iterator[None]:
    """Collectives that nobody counts must not run."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective that is not counted")

    with mock.patch.multiple(dist, **dict.fromkeys(names, refuse)):
        yield
