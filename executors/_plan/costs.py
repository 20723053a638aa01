"""Least times by links and by products, and the memory of a rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from executors._bench.layers import Shape, Storage
from executors._counts.cards import Card
from executors._plan.links import Link
from executors._plan.traffic import RowSizes, Way
from executors._plan.world import World
from executors.parallel.transport import portions


@dataclass(frozen=True)
class Nodes:
    """Nodes of GPUs.

    Attributes:
        card: the GPU.
        inside: the link of a GPU to the others of its node.
        across: that to other nodes.
        per_node: ranks of a node, in consecutive order.
    """

    card: Card
    inside: Link
    across: Link
    per_node: int

    def is_near(self, ranks: int) -> np.ndarray:
        """[W, W] whether two ranks are on one node."""
        nodes = np.arange(ranks) // self.per_node
        return np.asarray(nodes[:, None] == nodes)

    def link_seconds(self, sent: np.ndarray) -> float:
        """The least time in which bytes [W, W] get there: that of the slowest rank on its slower link.

        Both directions and both kinds of links work at once, at their full rates.
        """
        near = self.is_near(len(sent))
        times = [
            np.maximum(own.sum(1), own.sum(0)) / link.rate
            for own, link in ((sent * near, self.inside), (sent * ~near, self.across))
        ]
        return float(np.maximum(*times).max())

    def product_seconds(self, world: World, shape: Shape, storage: Storage, backward: bool) -> float:
        """The least time of the products of the slowest rank: the longer of arithmetic and memory.

        Arithmetic: 2 S 3 H I forward; backward the same for rows, and again for weights that are trained. Memory: the
        weights of the experts that have slots, once in each direction, and gradients of all of a rank's experts.
        """
        matrices = 2 * world.received_slots * shape.expert_matrices
        weights = world.active * expert_bytes(shape, storage)
        if backward:
            matrices = matrices * (1 if storage.frozen else 2)
            own = np.diff(world.experts.offsets)
            weights = weights + (0 if storage.frozen else own * expert_bytes(shape, Storage()))
        return float(np.maximum(matrices / self.card.tensor["bf16"], weights / self.card.dram).max())


def expert_bytes(shape: Shape, storage: Storage) -> int:
    """Of one expert's parameters; biases in bf16."""
    return round(storage.weight_bytes * shape.expert_matrices) + 2 * shape.expert_biases


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank.

    Attributes:
        weights: of its experts.
        gradients: of them, where they are trained, in bf16.
        kept: between forward and backward: its slots' rows, and what of each the executor inside keeps, one [S, 2I].
        exchange: the most that tokens and results on their way take besides, forward or backward.
    """

    weights: int
    gradients: int
    kept: int
    exchange: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.kept + self.exchange


def memories(world: World, shape: Shape, storage: Storage, way: Way, sizes: RowSizes) -> list[RankMemory]:
    """What each rank needs for a call under "all_to_all" and its backward pass.

    x, y and their gradients are the model's. What the products need beside their results is not counted.
    """
    rows_sent, rows, slots_sent, slots = world.rows.sum(1), world.rows.sum(0), world.slots.sum(1), world.slots.sum(0)
    out = np.maximum(rows_sent + rows, rows + slots) * sizes.row  # the rows to send, those received, those of slots
    if way.returns == "slot":  # all slots' results there, then here, on a grid [T, K, H], and two sums while they add
        back = (slots + slots_sent + world.tokens * world.top_k) * sizes.row + 2 * world.tokens * sizes.sum
    else:  # sums there, and a portion's grid [rows, K, H] and two sums; then sums sent, received, their total, and
        # a rank's while it adds
        portion = np.max(
            [world.rows[own.start : own.stop].sum(0) for own in portions(world.ranks, world.top_k)], axis=0
        )
        there = rows * sizes.sum + portion * (world.top_k * sizes.row + 2 * sizes.sum)
        here = (rows + rows_sent + world.tokens + world.rows.max(1)) * sizes.sum
        back = slots * sizes.row + np.maximum(there, here)
    kept = slots * (sizes.row + 2 * shape.intermediate * sizes.number)
    own = np.diff(world.experts.offsets)
    weights = own * expert_bytes(shape, storage)
    gradients = np.zeros_like(own) if storage.frozen else own * expert_bytes(shape, Storage())
    each = zip(weights, gradients, kept, np.maximum(out, back), strict=True)
    return [RankMemory(*map(int, values)) for values in each]
