"""Which experts the benchmark's tokens go to: as in real text, evenly at random, or mostly to a few.

"real" takes the bundled layer's router logits, which belong to 1024 consecutive bytes of real text and 32 experts. For
another number of experts, columns are drawn in blocks of up to 32: each block is the 32 experts in random order, read
from another place of the text on. So an expert keeps its own mean, spread and course over the text, experts of one
block keep their correlations, and blocks differ as other text would. At 32 experts the load is the real one: the
busiest has 2.6 times the mean. "uniform" draws all logits from N(0, 1); "skewed" adds 3 to those of K experts, which
then have most slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from executors._bench.layers import Shape
from executors._files.tensors import opened
from executors.layer_file import bundled_layer
from moe_ref.routing import route

KINDS = ("real", "uniform", "skewed")
BOOST = 3.0


@dataclass(frozen=True, eq=False)
class Batch:
    """One input.

    Attributes:
        x: [T, H] ~ N(0, 1), a leaf.
        dy: [T, H] ~ N(0, 1), the upstream gradient.
        topk_ids: [T, K] int64.
        topk_weights: [T, K] in the dtype of the model's router, a leaf.
        judged: positions of the tokens on which contenders are judged: the same tokens whatever T, spread over it.
    """

    x: Tensor
    dy: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    judged: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient."""
        return {"x": self.x, "topk_weights": self.topk_weights}


@dataclass(frozen=True)
class Load:
    """How evenly slots are spread.

    Attributes:
        max_over_mean: slots of the busiest expert over the mean.
        idle: experts without any.
        busiest: share of the slots that the K busiest experts have.
    """

    max_over_mean: float
    idle: int
    busiest: float


def logits(kind: str, tokens: int, shape: Shape, seed: int, draw: int) -> np.ndarray:
    """Router logits [T, E].

    Args:
        kind: one of `KINDS`.
        tokens: T.
        shape: the layer, for E and K.
        seed: says which experts are busy.
        draw: says which tokens, so that several batches have the same busy experts.
    """
    experts_rng, tokens_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1, draw])
    if kind == "real":
        return _real(tokens, shape.experts, experts_rng, tokens_rng)
    values = tokens_rng.standard_normal((tokens, shape.experts))
    if kind == "skewed":
        values[:, experts_rng.permutation(shape.experts)[: shape.top_k]] += BOOST
    return values


def batch(kind: str, tokens: int, judged: int, shape: Shape, device: str, seed: int) -> Batch:
    """Draws an input of T tokens, of which ``judged`` (or all T, if fewer) are the same for every T."""
    count = min(judged, tokens)
    common, own = (_draw(kind, n, shape, device, seed, draw) for n, draw in ((judged, 0), (tokens, tokens)))
    where = torch.linspace(0, tokens - 1, count, device=device).round().long()
    for all_tokens, those in zip(own, common, strict=True):
        all_tokens[where] = those[:count]
    x, dy, ids, weights = own
    return Batch(x.requires_grad_(), dy, ids, weights.requires_grad_(), where)


def load(topk_ids: Tensor, shape: Shape) -> Load:
    """How evenly a batch's slots are spread."""
    sizes = torch.bincount(topk_ids.flatten().cpu(), minlength=shape.experts).numpy()
    busiest = np.sort(sizes)[-shape.top_k :].sum() / sizes.sum()
    return Load(float(sizes.max() / sizes.mean()), int((sizes == 0).sum()), float(busiest))


def _draw(
    kind: str, tokens: int, shape: Shape, device: str, seed: int, draw: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, topk_ids, topk_weights."""
    routing = route(logits(kind, tokens, shape, seed, draw), shape.config)
    generator = torch.Generator(device).manual_seed(seed + 1_000_003 * draw + 1)
    x, dy = (
        torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        for _ in range(2)
    )
    ids = torch.from_numpy(np.ascontiguousarray(routing.topk_ids)).to(device, torch.int64)
    weights = torch.from_numpy(np.ascontiguousarray(routing.topk_weights)).to(device, shape.routing_dtype)
    return x, dy, ids, weights


def _real(tokens: int, experts: int, experts_rng: np.random.Generator, tokens_rng: np.random.Generator) -> np.ndarray:
    found = _bundled_logits()
    length, width = found.shape
    blocks = []
    for start in range(0, experts, width):
        columns = experts_rng.permutation(width)[: experts - start]
        rows = (tokens_rng.integers(length) + np.arange(tokens)) % length
        blocks.append(found[rows[:, None], columns])
    return np.concatenate(blocks, axis=1)


@cache
def _bundled_logits() -> np.ndarray:
    with opened(bundled_layer()) as file:
        return file.tensor("router_logits").double().numpy()
