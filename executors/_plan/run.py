"""Plans a layer on each number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from executors._bench.layers import Shape, Storage
from executors._plan.costs import Nodes, RankMemory, memories
from executors._plan.simulation import count
from executors._plan.traffic import (
    REDUCED,
    TO_ALL,
    WAYS,
    Message,
    RowSizes,
    Way,
    busiest,
    by_name,
    messages,
    reduced,
    spread_to_all,
    total,
)
from executors._plan.world import BATCHES, Show, World, draw, over_mean, split_world, world_of

SIMULATED_HIDDEN = 8  # H of the simulation: rows stay small, and the formulas are compared at that H
ID = 8  # bytes of an id
OTHER_KS = (1, 2, 4, 8, 16, 32)
OTHER_TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)


class Contradiction(AssertionError):
    """The formulas and the executor, as it was simulated, differ: one of them is wrong."""


@dataclass(frozen=True)
class PlanSettings:
    """What to plan.

    Attributes:
        shape: the layer.
        tokens: T of a rank.
        ranks: the numbers of ranks W.
        routing: its kind.
        weights: the format of the projections, by name.
        storage: the same in bytes.
        machine: nodes of GPUs.
        seed: of routing.
    """

    shape: Shape
    tokens: int
    ranks: tuple[int, ...]
    routing: str
    weights: str
    storage: Storage
    machine: Nodes
    seed: int

    @property
    def sizes(self) -> RowSizes:
        """Of numbers: x in bf16."""
        return RowSizes(self.shape.hidden, 2, self.shape.routing_dtype.itemsize)


@dataclass(frozen=True)
class PassBytes:
    """The bytes of a forward or backward pass, and their least time.

    Attributes:
        sent, received: bytes of the rank that sends, or receives, most.
        mean: bytes that a rank sends.
        by_name: bytes that the rank with most to send or to receive sends, by what for.
        seconds: least time of links.
    """

    sent: int
    received: int
    mean: float
    by_name: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class WayCosts:
    """One way on so many ranks.

    Attributes:
        way: how tokens travel and results come back.
        rank: whose collectives were counted in the simulated executor, and agree with the formulas.
        forward, backward: the bytes.
    """

    way: Way
    rank: int
    forward: PassBytes
    backward: PassBytes


@dataclass(frozen=True)
class RanksPlan:
    """The layer on so many ranks.

    Attributes:
        world: its ranks, with T tokens each.
        ways: costs of each.
        products: least seconds of the slowest rank's products, forward and backward.
        memory: of the rank that needs most, by what comes back.
        bounded: bytes forward, with the least ``max_slots``, by what comes back.
        own: least time under "all_reduce" over that under "all_to_all", forward, where each rank has its T tokens and
            keeps their results.
        same: the same where all ranks have the same T tokens and all need the results, by K.
        same_tokens: the same for the layer's K, by T.
    """

    world: World
    ways: list[WayCosts]
    products: tuple[float, float]
    memory: dict[str, RankMemory]
    bounded: dict[str, PassBytes]
    own: float
    same: dict[int, float]
    same_tokens: dict[int, float]

    @property
    def ranks(self) -> int:
        """W."""
        return self.world.ranks

    @property
    def slots_over_mean(self) -> float:
        """Slots of the busiest rank over the mean of all ranks, those without experts included."""
        return over_mean(self.world.received_slots)

    @property
    def rows_over_mean(self) -> float:
        """Rows that a rank receives: the most over the mean."""
        return over_mean(self.world.rows.sum(0))

    @property
    def sent_over_mean(self) -> float:
        """Rows that a rank sends: the most over the mean."""
        return over_mean(self.world.rows.sum(1))


def make_plan(plan: PlanSettings, show: Show) -> list[RanksPlan]:
    """The plan for each number of ranks.

    Args:
        plan: what for.
        show: called with a text, what is done and how much there is.

    Raises:
        Contradiction: the simulated executor sends other bytes than the formulas say.
    """
    shape = plan.shape
    batches = min(BATCHES, max(plan.ranks))
    ids = draw(plan.routing, plan.tokens, shape, plan.seed, batches, shape.top_k, show)
    config = shape.config
    most = min(max(OTHER_KS), shape.experts * config.topk_groups // config.num_groups)
    tokens = max(plan.tokens, *OTHER_TOKENS)
    (common,) = draw(plan.routing, tokens, shape, plan.seed, 1, max(most, shape.top_k), show)
    steps = len(plan.ranks) * (len(WAYS) + 2)
    out = []
    for number, ranks in enumerate(plan.ranks):

        def tell(text: str, step: int, number: int = number, ranks: int = ranks) -> None:
            show(f"{ranks} ranks: {text}", number * (len(WAYS) + 2) + step, steps)

        out.append(_on(plan, ranks, ids, common, tell))
    return out


def _on(
    plan: PlanSettings, ranks: int, ids: list[Tensor], common: Tensor, tell: Callable[[str, int], None]
) -> RanksPlan:
    tell("counting rows and slots", 0)
    shape, machine, sizes = plan.shape, plan.machine, plan.sizes
    world = world_of(ids, ranks, shape.experts)
    ways = []
    for number, way in enumerate(WAYS):
        tell(f"simulating {way}", 1 + number)
        ways.append(_way(plan, world, way))
    tell("comparing ways", 1 + len(WAYS))
    products = [machine.product_seconds(world, shape, plan.storage, backward) for backward in (False, True)]
    top_ks = sorted({k for k in (*OTHER_KS, shape.top_k) if k <= common.shape[1]})
    return RanksPlan(
        world,
        ways,
        (products[0], products[1]),
        {way.returns: _most(memories(world, shape, plan.storage, way, sizes)) for way in TO_ALL},
        {way.returns: _bounded(plan, world, way) for way in TO_ALL},
        own_tokens(machine, world, sizes),
        {k: same_tokens(machine, common[: plan.tokens, :k], ranks, shape.experts, sizes) for k in top_ks},
        {
            tokens: same_tokens(machine, common[:tokens, : shape.top_k], ranks, shape.experts, sizes)
            for tokens in OTHER_TOKENS
        },
    )


def _bounded(plan: PlanSettings, world: World, way: Way) -> PassBytes:
    return _pass(plan.machine, messages(world.bounded(world.least_bound), way, plan.sizes, False), 0)


def _most(each: list[RankMemory]) -> RankMemory:
    return max(each, key=lambda own: own.total)


def _way(plan: PlanSettings, world: World, way: Way) -> WayCosts:
    found = [messages(world, way, plan.sizes, backward) for backward in (False, True)]
    rank = busiest(total(found[0]))
    check(world, rank, way, replace(plan.sizes, hidden=SIMULATED_HIDDEN), plan.shape.routing_dtype)
    return WayCosts(way, rank, *(_pass(plan.machine, own, rank) for own in found))


def _pass(machine: Nodes, found: list[Message], rank: int) -> PassBytes:
    sent = total(found)
    return PassBytes(
        int(sent.sum(1).max()),
        int(sent.sum(0).max()),
        float(sent.sum(1).mean()),
        by_name(found, rank),
        machine.link_seconds(sent),
    )


def check(world: World, rank: int, way: Way, sizes: RowSizes, of_weights: torch.dtype) -> None:
    """Counts the collectives of a rank in the simulated executor, and compares each with the formulas.

    Raises:
        Contradiction: they differ, in number or in bytes from or to any rank.
    """
    call = count(world, rank, way, sizes.hidden, torch.bfloat16, of_weights)
    for backward, counted in ((False, call.forward), (True, call.backward)):
        expected = messages(world, way, sizes, backward) if world.ranks > 1 else []
        if len(expected) != len(counted):
            raise Contradiction(f"{way} has {len(expected)} exchanges, but {len(counted)} were counted")
        for number, (message, own) in enumerate(zip(expected, counted, strict=True)):
            same = np.array_equal(message.sent[rank], own.sent), np.array_equal(message.sent[:, rank], own.received)
            if not all(same):
                direction = "backward" if backward else "forward"
                raise Contradiction(f"{way}: exchange {number} {direction}, {message.name}, has other bytes")


def own_tokens(machine: Nodes, world: World, sizes: RowSizes) -> float:
    """Least time under "all_reduce" over that under "all_to_all", forward: each rank has tokens of its own.

    Under "all_reduce" all ranks first get all tokens, their ids and their weights, and end with all results.
    """
    tokens, top_k = world.tokens, world.top_k
    gathered = spread_to_all(tokens, sizes.row + top_k * (ID + sizes.weight))
    others = [
        gathered + total(reduced(int(tokens.sum()), top_k, world.ranks, way.returns, sizes, False)) for way in REDUCED
    ]
    return _ratio(machine, others, [total(messages(world, way, sizes, False)) for way in TO_ALL])


def same_tokens(machine: Nodes, ids: Tensor, ranks: int, experts: int, sizes: RowSizes) -> float:
    """The same where all ranks have the same tokens, of ids [T, K], and all need all results.

    Under "all_to_all" each does a part of the tokens, and gives its results to all others.
    """
    world = split_world(ids, ranks, experts)
    given = spread_to_all(world.tokens, sizes.row)
    tokens, top_k = ids.shape
    others = [total(reduced(tokens, top_k, ranks, way.returns, sizes, False)) for way in REDUCED]
    return _ratio(machine, others, [given + total(messages(world, way, sizes, False)) for way in TO_ALL])


def _ratio(machine: Nodes, reduced_ways: list[np.ndarray], to_all: list[np.ndarray]) -> float:
    """Of the faster of each; 1 where nothing travels."""
    one, other = (min(map(machine.link_seconds, own)) for own in (reduced_ways, to_all))
    return one / other if other else 1.0
