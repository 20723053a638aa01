"""The real executor as one of many ranks, under torch's fake process group: what it sends is counted, not sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from executors._plan.traffic import Way
from executors._plan.world import World
from executors.parallel import ExpertParallel
from moe_ref.types import MoEConfig, MoEWeights

INTERMEDIATE = 8  # it travels nowhere


class Exchange(NamedTuple):
    """Bytes of one collective of a rank.

    Attributes:
        sent: [W] to each rank, itself left out.
        received: [W] from each rank, itself left out.
    """

    sent: np.ndarray
    received: np.ndarray


class CountedCall(NamedTuple):
    """The exchanges of a call."""

    forward: list[Exchange]
    backward: list[Exchange]


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands for all other ranks in each collective: counts it, and completes it at once.

    The others say in the first comparison what this rank says, but their own sizes. What they send otherwise is zeros,
    which as heads of slots name row 0 and expert 0.

    Attributes:
        world: of all ranks.
        rank: this one.
        sizes: [W, 2] rows and slots that each rank sends to this one; None where they are not told.
        found: the exchanges so far.
    """

    def __init__(self, world: World, rank: int, way: Way) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world, self.rank = world, rank
        are_told = way.dispatch == "all_to_all" and world.max_slots is None
        told = np.stack([world.rows[:, rank], world.slots[:, rank]], axis=1)
        self.sizes = torch.from_numpy(told) if are_told else None
        self.found: list[Exchange] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operator: collectives are counted, others run."""
        if func is torch.ops.c10d.alltoall_base_.default:
            return self._exchange(*args[:2], *args[3:5])
        if func.namespace == "c10d":
            raise NotImplementedError(f"{func}: must be counted, too")
        return func(*args, **(kwargs or {}))

    def _exchange(self, received: Tensor, sent: Tensor, receive: list[int], send: list[int]) -> Any:
        row = sent.shape[1] * sent.element_size()
        if sent.dtype == torch.int64:  # a comparison: all else travels as bytes
            received.copy_(sent)
            if self.sizes is not None and not self.found:
                received[:, -2:] = self.sizes
        else:
            received.zero_()
        self._add([row * count for count in send], [row * count for count in receive])
        return _completed()

    def _add(self, sent: list[int], received: list[int]) -> None:
        own = Exchange(np.array(sent), np.array(received))
        own.sent[self.rank] = own.received[self.rank] = 0
        self.found.append(own)


def count(world: World, rank: int, way: Way, hidden: int, dtype: torch.dtype, of_weights: torch.dtype) -> CountedCall:
    """Runs a call of `executors.parallel.ExpertParallel` and its backward pass as a rank of the world.

    Args:
        world: says what the others send.
        rank: which one.
        way: how.
        hidden: H.
        dtype: of x and of the projections.
        of_weights: of the slots' weights.

    Raises:
        RuntimeError: this process is one of a real group.
    """
    ids = world.ids[rank if way.dispatch == "all_to_all" else 0]
    own = len(world.experts.experts(rank))
    weights = MoEWeights(
        torch.zeros(own, 2 * INTERMEDIATE, hidden, dtype=dtype).requires_grad_(),
        torch.zeros(own, hidden, INTERMEDIATE, dtype=dtype).requires_grad_(),
        config=MoEConfig(ids.shape[1]),
    )
    x = torch.zeros(ids.shape[0], hidden, dtype=dtype).requires_grad_()
    topk_weights = torch.zeros(ids.shape, dtype=of_weights).requires_grad_()
    with _fake_group(rank, world.ranks), _Counting(world, rank, way) as counting:
        options = {"num_experts": world.experts.num_experts, "max_slots": world.max_slots}
        executor = ExpertParallel("native", None, *way, **options)  # type: ignore[arg-type]
        y = executor.experts(x, topk_ids=ids, topk_weights=topk_weights, weights=weights)
        forward = list(counting.found)
        y.backward(torch.zeros_like(y))  # type: ignore[no-untyped-call]
    return CountedCall(forward, counting.found[len(forward) :])


@contextmanager
def _fake_group(rank: int, ranks: int) -> Iterator[None]:
    if dist.is_initialized():
        raise RuntimeError("torch.distributed: must not be initialised in a process that stands for one of many ranks")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _completed() -> Any:
    done: torch.futures.Future[None] = torch.futures.Future()
    done.set_result(None)
    return _create_work_from_future(done).boxed()
