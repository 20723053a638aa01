"""W ranks and their tokens: who sends how many rows and slots to whom, by the executor's own planning.

Tokens are those of `executors._bench.routing`. Up to `BATCHES` batches are drawn, and rank r has batch r mod `BATCHES`:
the bundled text is no longer than 1024 tokens anyhow. Experts are in random order, the same on all ranks, since blocks
of experts would otherwise be copies of the bundled layer's 32, and a rank that has a block as even as no real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from executors._bench.layers import LAYERS, Shape
from executors._bench.routing import logits
from executors.parallel import ExpertMap
from executors.parallel.planning import sending
from moe_ref.routing import choose

BATCHES = 16
GROUPS = {"deepseek-v3": (8, 4)}  # n_group and topk_group of its config.json; the benchmark's layer has no groups

Show = Callable[[str, int, int], None]


def layer_of(name: str) -> Shape:
    """The benchmark's layer of that name, which chooses within groups where the model does."""
    shape = LAYERS[name]
    if name not in GROUPS:
        return shape
    groups, kept = GROUPS[name]
    return replace(shape, config=replace(shape.config, num_groups=groups, topk_groups=kept, group_score="top2_sum"))


def draw(kind: str, tokens: int, shape: Shape, seed: int, count: int, top_k: int, show: Show) -> list[Tensor]:
    """Ids [T, K] of ``count`` batches.

    Args:
        kind: of routing.
        tokens: T of each.
        shape: the layer.
        seed: says which experts are busy, and which tokens are drawn.
        count: how many.
        top_k: K, the layer's or another.
        show: called with a text, what is done and how much there is.
    """
    order = np.random.default_rng([seed, 2]).permutation(shape.experts)
    config = replace(shape.config, top_k=top_k)
    out = []
    for batch in range(count):
        show("choosing experts", batch, count)
        chosen = choose(logits(kind, tokens, shape, seed, batch)[:, order], config)
        out.append(torch.from_numpy(np.ascontiguousarray(chosen)).long())
    return out


@dataclass(frozen=True, eq=False)
class World:
    """All ranks of a group in one call under "all_to_all".

    Attributes:
        experts: which rank has which.
        ids: of each rank, [T, K]; several ranks may have the same.
        rows: [W, W] how many rows rank s sends to rank r, itself included.
        slots: [W, W] how many slots.
        load: [E] slots of each expert.
        max_slots: None, or what ``rows`` and ``slots`` are all filled up to.
    """

    experts: ExpertMap
    ids: Sequence[Tensor]
    rows: np.ndarray
    slots: np.ndarray
    load: np.ndarray
    max_slots: int | None = None

    def bounded(self, max_slots: int) -> World:
        """The same tokens where each rank sends so many rows and slots to each, as the executor's option fills up."""
        filled = np.full_like(self.slots, max_slots)
        return replace(self, rows=filled, slots=filled, max_slots=max_slots)

    @property
    def least_bound(self) -> int:
        """The most slots that a rank sends to another, itself included: the least ``max_slots``."""
        return int(self.slots.max())

    @property
    def ranks(self) -> int:
        """W."""
        return self.experts.ranks

    @property
    def tokens(self) -> np.ndarray:
        """[W] T of each rank."""
        return np.array([own.shape[0] for own in self.ids])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.ids[0].shape[1])

    @property
    def fan_out(self) -> float:
        """To how many ranks a token goes, its own included: the mean."""
        return float(self.rows.sum() / self.tokens.sum())

    @property
    def copies(self) -> float:
        """To how many other ranks a token goes: the mean."""
        return float((self.rows.sum() - self.rows.trace()) / self.tokens.sum())

    @property
    def received_slots(self) -> np.ndarray:
        """[W] slots that each rank's experts do."""
        return np.asarray(self.slots.sum(0))

    @property
    def idle(self) -> int:
        """Ranks without experts."""
        return sum(not self.experts.experts(rank) for rank in range(self.ranks))

    @property
    def active(self) -> np.ndarray:
        """[W] experts of each rank that have any slot."""
        return np.array([(self.load[slice(*self.experts.offsets[r : r + 2])] > 0).sum() for r in range(self.ranks)])


def world_of(ids: Sequence[Tensor], ranks: int, experts: int) -> World:
    """The world of so many ranks, of which rank r has the r-th ids, and begins again where there are fewer.

    Args:
        ids: of batches, [T, K] each.
        ranks: W.
        experts: E.
    """
    parts = ExpertMap(experts, ranks)
    found = [sending(own, parts) for own in ids[:ranks]]
    real = [own[(own >= 0) & (own < experts)] for own in ids[:ranks]]  # others name empty slots (R7)
    loads = [torch.bincount(own, minlength=experts).numpy() for own in real]
    which = [rank % len(found) for rank in range(ranks)]
    rows = np.stack([own.needed.sum(1).numpy() for own in found])[which]
    slots = np.stack([own.slots.numpy() for own in found])[which]
    return World(parts, [ids[own] for own in which], rows, slots, np.stack(loads)[which].sum(0))


def split_world(ids: Tensor, ranks: int, experts: int) -> World:
    """The world whose ranks share the tokens of one batch [T, K], in parts as even as they can be."""
    return world_of(torch.tensor_split(ids, ranks), ranks, experts)


def over_mean(values: np.ndarray) -> float:
    """The largest over the mean."""
    return float(values.max() / values.mean())
