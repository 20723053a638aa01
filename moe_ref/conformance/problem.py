"""A problem: a small description from which all arrays follow, and the exact answer with its error bars.

A `Problem` prints as the call that makes it, so a failing example can be pasted into a test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from threadpoolctl import threadpool_limits

from moe_ref.error_bars import TensorBars, error_bars
from moe_ref.experts import expert, groups, split_gate_up, up
from moe_ref.grouping import group, is_slot
from moe_ref.numerics import FORMATS, round_to_nearest
from moe_ref.routing import broken_rows, route, weigh
from moe_ref.types import MoEConfig, MoEWeights

ACCUMULATED = 1e-5  # more than an fp32 sum of a few thousand terms of O(1) errs by
PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class Problem:
    """Everything that defines a call and its upstream gradient; the bulk of the numbers comes from ``seed``.

    Attributes:
        tokens, experts, hidden, intermediate: T, E, H, I.
        config: the layer's configuration; ``config.top_k`` is K.
        dtype: of x and the projections.
        entry: "layer" (router_logits are given) or "experts" (topk_ids and topk_weights are).
        routing_dtype: of router_logits or topk_weights.
        ids_dtype: of topk_ids.
        bias_dtype: of both biases.
        gate_up_bias, down_bias: whether the layer has them.
        logits: "random"; "ties" (whole numbers from -1 to 1, +0 and -0 among them); "masked" (a third are -inf);
            "skewed" (some experts are far more likely); "shifted" (rows around +100, or -100 for the softmax kinds);
            "close" (1 and its neighbours at a distance of 1e-12: ties in all but float64).
        cut_points: for entry "experts": group sizes by cut points drawn with replacement from E + 1 places, so that
            empty experts and duplicates in a row come by themselves; otherwise K distinct random ids a row.
        empty_slots: for entry "experts": some ids lie outside [0, E), with NaN and inf among their weights.
        broken_logits: rows spoiled with NaN, +inf, or nothing but -inf.
        broken_x: rows of x spoiled with one NaN or infinity.
        batch: split the tokens over two leading dimensions (where T is even), or none (where T is 1).
        x_layout, weights_layout, dy_layout, routing_layout:
            "contiguous"; "transposed" (stored with the last two axes swapped);
            "sliced" (every other element of a larger array); for x "expanded" (all tokens are one row, stride 0); for
            dy "scalar" (all ones, strides 0, as ``y.sum().backward()`` has it).
        top_k_given: for entry "experts": whether the configuration names K, or has None and ``topk_ids`` tell it.
        frozen: names of inputs that need no gradient.
        seed: of all numbers.
    """

    tokens: int
    experts: int
    hidden: int
    intermediate: int
    config: MoEConfig
    dtype: str = "float32"
    entry: str = "layer"
    routing_dtype: str = "float32"
    ids_dtype: str = "int64"
    bias_dtype: str = "float32"
    gate_up_bias: bool = False
    down_bias: bool = False
    logits: str = "random"
    cut_points: bool = False
    empty_slots: bool = False
    broken_logits: int = 0
    broken_x: int = 0
    batch: bool = False
    x_layout: str = "contiguous"
    weights_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    routing_layout: str = "contiguous"
    top_k_given: bool = True
    frozen: frozenset[str] = frozenset()
    seed: int = 0

    @property
    def top_k(self) -> int:
        """K."""
        assert self.config.top_k is not None
        return self.config.top_k

    def dtype_of(self, name: str) -> str:
        """The dtype of an output, an input, or its gradient (T1, T2)."""
        if name in ("router_logits", "topk_weights"):
            return self.routing_dtype
        return self.bias_dtype if name.endswith("_bias") else self.dtype


@dataclass(frozen=True, eq=False)
class Arrays:
    """A problem's numbers, in float64 NumPy, each representable in its own dtype. Token dimension flat."""

    x: np.ndarray
    dy: np.ndarray
    topk_ids: np.ndarray
    router_logits: np.ndarray | None
    topk_weights: np.ndarray | None
    weights: MoEWeights


@dataclass(frozen=True, eq=False)
class Reference:
    """The exact answer.

    Attributes:
        arrays: the problem's numbers.
        bars: exact value and error bars of y and of every gradient, token dimension flat.
        broken_routing: [T] tokens whose routing weights are undefined (R4).
        broken: [T] those, and the tokens with a NaN or an infinity in x.
        infinite: [T] tokens with an infinity in x, whose own output may be anything.
    """

    arrays: Arrays
    bars: dict[str, TensorBars]
    broken_routing: np.ndarray
    broken: np.ndarray
    infinite: np.ndarray


@lru_cache(maxsize=64)
def reference(problem: Problem) -> Reference:
    """Builds a problem's numbers and samples its error bars, once for all executors and checks."""
    arrays = build(problem)
    # One BLAS thread: the products are small, and beside torch's own threads more would only get in the way.
    with threadpool_limits(1, "blas"), np.errstate(invalid="ignore"):
        bars = error_bars(
            arrays.x,
            arrays.topk_ids,
            arrays.weights,
            arrays.dy,
            router_logits=arrays.router_logits,
            topk_weights=arrays.topk_weights,
            dtype=problem.dtype,
            seed=problem.seed,
        )
    if arrays.router_logits is None:
        broken_routing = np.zeros(problem.tokens, dtype=bool)
    else:
        broken_routing = broken_rows(arrays.router_logits, problem.config)
    broken = broken_routing | ~np.isfinite(arrays.x).all(axis=1)
    return Reference(arrays, bars, broken_routing, broken, np.isinf(arrays.x).any(axis=1))


def build(problem: Problem) -> Arrays:
    """Draws a problem's numbers: x and dy of N(0, 1), weights of N(0, 1/fan_in), so that pre-activations are O(1)."""
    rng = np.random.default_rng(problem.seed)

    def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
        return round_to_nearest(rng.standard_normal(shape) * scale, dtype)

    tokens, hidden, inner = problem.tokens, problem.hidden, problem.intermediate
    x = normal((tokens, hidden), problem.dtype)
    if problem.x_layout == "expanded":
        x = np.repeat(x[:1], tokens, axis=0)
    dy = np.ones_like(x) if problem.dy_layout == "scalar" else normal((tokens, hidden), problem.dtype)
    biases = problem.gate_up_bias, problem.down_bias
    weights = MoEWeights(
        normal((problem.experts, 2 * inner, hidden), problem.dtype, hidden**-0.5),
        normal((problem.experts, hidden, inner), problem.dtype, inner**-0.5),
        normal((problem.experts, 2 * inner), problem.bias_dtype, 0.5) if biases[0] else None,
        normal((problem.experts, hidden), problem.bias_dtype, 0.5) if biases[1] else None,
        config=problem.config,
    )
    logits = topk_weights = None
    if problem.entry == "layer":
        logits = _break_logits(_logits(problem, rng), problem, rng)
        topk_ids = route(logits, problem.config).topk_ids
    else:
        topk_ids = _ids(problem, rng)
        topk_weights = _topk_weights(topk_ids, problem, rng)
    if problem.config.limit is not None:
        x, dy = _clear_of_limit(x, dy, topk_ids, weights, problem)
    for row in rng.permutation(tokens)[: problem.broken_x]:
        x[row, rng.integers(hidden)] = rng.choice([math.nan, math.inf, -math.inf])
    return Arrays(x, dy, topk_ids, logits, topk_weights, weights)


def _logits(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    shape = (problem.tokens, problem.experts)
    if problem.logits == "ties":
        return np.copysign(rng.integers(-1, 2, shape).astype(float), rng.choice([-1.0, 1.0], shape))
    if problem.logits == "close":
        return round_to_nearest(1 + 1e-12 * rng.integers(-1, 2, shape), problem.routing_dtype)
    logits = rng.standard_normal(shape) * 2
    if problem.logits == "shifted":
        signs = [1.0] if problem.config.scoring == "sigmoid" else [1.0, -1.0]  # sigmoid(-100) leaves fp32's range
        logits = logits + 100 * rng.choice(signs, (problem.tokens, 1))
    if problem.logits == "skewed":
        logits = logits + 4 * rng.standard_normal(problem.experts)
    if problem.logits == "masked":
        logits[rng.random(shape) < 1 / 3] = -math.inf
        logits[:, 0] = np.where(np.isinf(logits).all(axis=1), 0.0, logits[:, 0])
    return round_to_nearest(logits, problem.routing_dtype)


def _break_logits(logits: np.ndarray, problem: Problem, rng: np.random.Generator) -> np.ndarray:
    logits = logits.copy()
    for number, row in enumerate(rng.permutation(problem.tokens)[: problem.broken_logits]):
        kind = number % 3
        if kind == 2:
            logits[row] = -math.inf
        else:
            logits[row, rng.integers(problem.experts)] = (math.nan, math.inf)[kind]
    return logits


def _ids(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    tokens, top_k, experts = problem.tokens, problem.top_k, problem.experts
    if problem.cut_points:
        slots = tokens * top_k
        cuts = np.sort(rng.integers(0, experts + 1, experts - 1)) * slots // experts
        sizes = np.diff(np.concatenate([[0], cuts, [slots]]))
        ids = rng.permutation(np.repeat(np.arange(experts), sizes)).reshape(tokens, top_k)
    else:
        ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    if problem.empty_slots:
        beyond = 2**32 if problem.ids_dtype == "int64" else 2**31 - 1  # int64 must not be read as int32
        foreign = rng.choice([-1, experts, experts + 7, -(2**31), beyond], ids.shape)
        ids = np.where(rng.random(ids.shape) < 0.3, foreign, ids)
    return ids.astype(np.int64)


def _topk_weights(topk_ids: np.ndarray, problem: Problem, rng: np.random.Generator) -> np.ndarray:
    logits = rng.standard_normal(topk_ids.shape) * 2
    slots = np.broadcast_to(np.arange(problem.top_k), topk_ids.shape)
    weights = round_to_nearest(weigh(logits, slots, MoEConfig(problem.top_k)), problem.routing_dtype)
    spoiled = rng.choice([math.nan, math.inf, 1.0], topk_ids.shape)
    return np.where(is_slot(topk_ids, problem.experts), weights, spoiled)


def _clear_of_limit(
    x: np.ndarray, dy: np.ndarray, topk_ids: np.ndarray, weights: MoEWeights, problem: Problem
) -> tuple[np.ndarray, np.ndarray]:
    """Moves tokens whose pre-activations lie so near the clamp's limit that rounding might carry them across.

    The derivative jumps there, so an honest implementation may differ by O(1). A token that cannot be moved clear gets
    an upstream gradient of zero: its forward pass still counts, and it disturbs no gradient.
    """
    expanded = problem.x_layout == "expanded"
    for _ in range(6):
        push = pushes_off_limit(x, topk_ids, weights, problem.dtype)
        if expanded and len(push):
            push = np.repeat(push.sum(axis=0, keepdims=True), len(push), axis=0)
        if not push.any():
            return x, dy
        x = round_to_nearest(x + push, problem.dtype)
    near = np.count_nonzero(pushes_off_limit(x, topk_ids, weights, problem.dtype), axis=1, keepdims=True)
    if problem.dy_layout == "scalar":
        near = near.sum(axis=0, keepdims=True)
    return x, np.where(near > 0, 0.0, dy)


def pushes_off_limit(x: np.ndarray, topk_ids: np.ndarray, weights: MoEWeights, dtype: str) -> np.ndarray:
    """For each token, the smallest steps that take its pre-activations out of the clamp limit's margin.

    Args:
        x: [T, H] float64.
        topk_ids: [T, K].
        weights: the layer's parameters, float64.
        dtype: in which an implementation stores; its rounding is the margin.

    Returns:
        [T, H], zero where a token is clear of the limit, or where there is none.
    """
    limit = weights.config.limit
    if limit is None:
        return np.zeros_like(x)
    u = FORMATS[dtype].unit_roundoff
    grouping = group(topk_ids, weights.num_experts)
    push = np.zeros_like(x)
    for index, where in groups(grouping.group_offsets):
        slots = grouping.order[where]
        tokens = slots // topk_ids.shape[1]
        parameters = expert(weights, index)
        z = up(x[tokens], parameters)
        bias = 0.0 if parameters.gate_up_proj_bias is None else parameters.gate_up_proj_bias
        margin = 2 * u * (np.abs(z - bias) + np.abs(z) + limit) + ACCUMULATED
        gate, up_half = split_gate_up(z, weights.config)
        gate_margin, up_margin = split_gate_up(margin, weights.config)
        gate_rows, up_rows = split_gate_up(parameters.gate_up_proj.T, weights.config)
        steps = [(_step(gate - limit, gate_margin), gate_rows)]
        steps += [(_step(up_half - limit, up_margin), up_rows), (_step(up_half + limit, up_margin), up_rows)]
        for step, rows in steps:
            np.add.at(push, tokens, step @ (rows / np.maximum((rows**2).sum(axis=0), 1e-6)).T)
    return push


def _step(distance: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """How far to move what is nearer than its margin: twice the margin, away from the limit."""
    return np.where(np.abs(distance) < margin, np.where(distance < 0, -2.0, 2.0) * margin, 0.0)


def leading_shape(problem: Problem) -> tuple[int, ...]:
    """X's leading dimensions: (T,), or (2, T/2), or () for a single token."""
    tokens = problem.tokens
    if not problem.batch:
        return (tokens,)
    if tokens == 1:
        return ()
    return (2, tokens // 2) if tokens % 2 == 0 else (1, tokens)
