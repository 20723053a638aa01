"""The bytes of a plan are those that 2 and 4 processes send and receive, exchange by exchange."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import parallel_counted
from executors._plan import traffic
from executors._plan.traffic import WAYS, RowSizes, Way, messages
from executors._plan.world import World, world_of
from moe_ref.conformance.parallel.cluster import Cluster
from parallel_counted import Sent

TOKENS, EXPERTS, TOP_K, HIDDEN = (7, 0, 12, 3), 10, 3, 20
DTYPES = {2: (torch.bfloat16, torch.float32), 4: (torch.float32, torch.bfloat16)}  # of x, and of slots' weights

BOUND = 30  # of slots, which no rank exceeds

Counts = Callable[[int, Way, int | None], list[tuple[list[Sent], list[Sent]]]]


def ids_of(ranks: int, experts: int = EXPERTS) -> list[Tensor]:
    """Distinct experts of each token; some slots are empty (R7)."""
    generator = torch.Generator().manual_seed(ranks)
    out = [torch.rand(tokens, experts, generator=generator).argsort(1)[:, :TOP_K] for tokens in TOKENS[:ranks]]
    out[0][0, 1], out[0][3, 0] = -1, experts
    return out


@pytest.fixture(scope="module")
def counts(cluster: Cluster) -> Counts:
    """What all ranks counted, for so many ranks, a way and a bound: once for all tests."""

    @cache
    def count(ranks: int, way: Way, bound: int | None) -> list[tuple[list[Sent], list[Sent]]]:
        arguments = (ids_of(ranks), *way, EXPERTS, HIDDEN, DTYPES[ranks], bound)
        return cluster.run(parallel_counted.counted, *arguments, ranks=ranks)

    return count


def differences(counts: Counts, ranks: int, way: Way, bound: int | None = None) -> list[str]:
    """Exchanges of which plan and processes differ in number or in bytes."""
    of_x, of_weights = DTYPES[ranks]
    world, sizes = world_of(ids_of(ranks), ranks, EXPERTS), RowSizes(HIDDEN, of_x.itemsize, of_weights.itemsize)
    world = world.bounded(bound) if bound else world
    out = []
    for backward in (False, True):
        expected = messages(world, way, sizes, backward)
        for rank, found in enumerate(counts(ranks, way, bound)):
            own = found[backward]
            if len(own) != len(expected):
                out.append(f"rank {rank} has {len(own)} exchanges, not {len(expected)}")
                continue
            for message, (sent, received) in zip(expected, own, strict=True):
                if sent != message.sent[rank].tolist() or received != message.sent[:, rank].tolist():
                    out.append(f"rank {rank}: {message.name}, {'backward' if backward else 'forward'}")
    return out


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_processes(counts: Counts, ranks: int, way: Way) -> None:
    assert differences(counts, ranks, way) == []


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_bytes_are_those_of_processes_with_a_bound(counts: Counts, way: Way) -> None:
    assert differences(counts, 2, way, BOUND) == []
    assert world_of(ids_of(2), 2, EXPERTS).least_bound < BOUND


def transposed(world: World, way: Way, sizes: RowSizes) -> np.ndarray:
    return world.slots * sizes.row if way.returns == "slot" else world.rows * sizes.sum


def without_rows_that_meet(world: World, way: Way, sizes: RowSizes) -> np.ndarray:
    return world.slots.T * (sizes.row if way.returns == "slot" else sizes.sum)


def in_dtype_of_x(world: World, way: Way, sizes: RowSizes) -> np.ndarray:
    return world.slots.T * sizes.row if way.returns == "slot" else world.rows.T * sizes.row


def even_parts(count: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    parts = np.full((ranks, ranks), count // ranks)
    return parts, parts


MUTANTS: dict[str, tuple[str, object, Sequence[Way]]] = {
    "heads have no k": ("HEAD", 8, WAYS[:2]),
    "heads are not sent": ("HEAD", 0, WAYS[:2]),
    "sizes are int32": ("NUMBER", 4, WAYS),
    "results go on": ("_returned", transposed, WAYS[:2]),
    "a rank returns slots": ("_returned", without_rows_that_meet, WAYS[1:2]),
    "sums are bf16": ("_returned", in_dtype_of_x, WAYS[1:2]),
    "parts are even": ("_parts", even_parts, WAYS[2:]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_model_is_seen(counts: Counts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, changed, ways = MUTANTS[name]
    monkeypatch.setattr(traffic, what, changed)
    for way in ways:
        assert differences(counts, 2, way), way
