"""Draws a problem's numbers from its seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_ref.activations import split_gate_up
from moe_ref.conformance.judgement.choices import have_margins
from moe_ref.conformance.problems.kinks import clear_of_kinks
from moe_ref.conformance.problems.packed import quantized
from moe_ref.conformance.problems.problem import Problem
from moe_ref.grouping import is_slot
from moe_ref.numerics import round_to_nearest
from moe_ref.routing import chosen_scores, route, weigh
from moe_ref.types import ExpertLoRA, MoEConfig, MoEWeights

SELECTION_BIAS = {"small": 0.5, "large": 100.0, "infinite": 0.5}
SHIFTS = {"sigmoid": [100.0], "sqrtsoftplus": [100.0, -50.0]}  # exp(-100) leaves fp32's range
SCALINGS = (2.0, 0.5)  # of the adapters of gate_up_proj and of down_proj


@dataclass(frozen=True, eq=False)
class Arrays:
    """A problem's numbers in float64 NumPy, each representable in its own dtype. The token dimension is flat.

    Projections in 4 bits consist of NumPy arrays in their own dtypes.
    """

    x: np.ndarray
    dy: np.ndarray
    topk_ids: np.ndarray
    router_logits: np.ndarray | None
    topk_weights: np.ndarray | None
    weights: MoEWeights


def build(problem: Problem, chosen: tuple[int, ...] | None = None) -> Arrays:
    """Draws a problem's numbers: x and dy from N(0, 1), weights from N(0, 1/fan_in), so that pre-activations are O(1).

    The problem's powers of two multiply these numbers.

    Args:
        problem: the description.
        chosen: T*K ids that replace the specification's own, where more than one choice is right (R2).
    """
    rng = np.random.default_rng(problem.seed)

    def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
        return round_to_nearest(rng.standard_normal(shape) * scale, dtype)

    tokens, hidden = problem.tokens, problem.hidden
    x = normal((tokens, hidden), problem.dtype, problem.factor("x"))
    x[:1] = round_to_nearest(x[:1] * problem.factor("x[0]"), problem.dtype)
    if problem.x_layout == "expanded":
        x = np.repeat(x[:1], tokens, axis=0)
    dy_factor = problem.factor("dy")
    scalar = problem.dy_layout == "scalar"
    dy = np.full_like(x, dy_factor) if scalar else normal((tokens, hidden), problem.dtype, dy_factor)
    weights = _weights(problem, rng)
    config, bias = problem.config, weights.selection_bias
    logits = topk_weights = None
    if problem.entry == "layer":
        logits = _logits(problem, rng)
        logits = _clear(logits, problem, bias, rng)
        logits = _break_logits(logits, problem, rng)
        topk_ids = route(logits, config, bias).topk_ids
        topk_ids = topk_ids if chosen is None else np.reshape(chosen, topk_ids.shape)
        slot_weights = weigh(logits, topk_ids, config, expert_scale=weights.expert_scale)
    else:
        topk_ids = _ids(problem, rng)
        slot_weights = topk_weights = _topk_weights(topk_ids, problem, rng)
    equal_rows = problem.x_layout == "expanded", problem.dy_layout == "scalar"
    size = max(1.0, problem.factor("x", "x[0]", "gate_up_proj", "gate", "up"))
    x, dy = clear_of_kinks(x, dy, topk_ids, slot_weights, weights, problem.dtype, equal_rows, size)
    for row in rng.permutation(tokens)[: problem.broken_x]:
        x[row, rng.integers(hidden)] = rng.choice([math.nan, math.inf, -math.inf])
    return Arrays(x, dy, topk_ids, logits, topk_weights, weights)


def _weights(problem: Problem, rng: np.random.Generator) -> MoEWeights:
    experts, hidden, inner, rows = problem.experts, problem.hidden, problem.intermediate, problem.gate_up_rows

    def normal(shape: tuple[int, ...], dtype: str, scale: float) -> np.ndarray:
        return round_to_nearest(rng.standard_normal((experts, *shape)) * scale, dtype)

    def factors(name: str, rank: int, out: int, width: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not rank:
            return None, None
        dtype = problem.lora_dtype
        a, b = (problem.factor(f"{name}_lora_{letter}") for letter in "ab")
        return normal((rank, width), dtype, a * width**-0.5), normal((out, rank), dtype, b * rank**-0.5)

    gate_up, down = (
        normal((rows, hidden), problem.dtype, problem.factor("gate_up_proj") * hidden**-0.5),
        normal((hidden, inner), problem.dtype, problem.factor("down_proj") * inner**-0.5),
    )
    if problem.config.gated:
        gate, up = split_gate_up(gate_up.swapaxes(1, 2), problem.config)  # views
        gate *= problem.factor("gate")
        up *= problem.factor("up")
        gate_up = round_to_nearest(gate_up, problem.dtype)
    gate_up_bias, down_bias = (
        normal((length,), problem.bias_dtype, 0.5 * problem.factor(name)) if there else None
        for name, length, there in (
            ("gate_up_proj_bias", rows, problem.gate_up_bias),
            ("down_proj_bias", hidden, problem.down_bias),
        )
    )
    scale = SELECTION_BIAS.get(problem.selection_bias)
    selection = None if scale is None else normal((), problem.bias_dtype, scale)
    if selection is not None and problem.selection_bias == "infinite":
        selection = np.where(rng.random(experts) < 1 / 2, -math.inf, selection)
        selection[rng.integers(experts)] *= math.inf
    scales = 1 + normal((), problem.bias_dtype, 0.5) if problem.expert_scale else None
    scales = None if scales is None else round_to_nearest(scales, problem.bias_dtype)
    lora = None
    if problem.gate_up_rank or problem.down_rank:
        pairs = (
            factors("gate_up", problem.gate_up_rank, rows, hidden),
            factors("down", problem.down_rank, hidden, inner),
        )
        lora = ExpertLoRA(*pairs[0], *pairs[1], *SCALINGS)
    norm = 1 + 0.5 * rng.standard_normal(hidden) if problem.post_expert_norm else None
    norm = None if norm is None else round_to_nearest(norm, problem.bias_dtype)
    biases = gate_up_bias, down_bias, selection
    learned = {"expert_scale": scales, "post_expert_norm": norm}
    weights = MoEWeights(gate_up, down, *biases, lora, config=problem.config, **learned)
    return quantized(weights, problem)


def _clear(logits: np.ndarray, problem: Problem, bias: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Draws rows of logits anew until rounding decides nothing.

    No other choice of experts is near, where the problem has margins, and no sum of scores is near the epsilon below
    which the gradient is another (R5).
    """
    for _ in range(100):
        unclear = _near_epsilon(logits, problem.config, bias)
        if problem.margins:
            unclear |= ~have_margins(logits, problem.config, bias)
        if not unclear.any():
            return logits
        fresh = round_to_nearest(rng.standard_normal(logits.shape) * 2, problem.routing_dtype)
        logits = np.where(unclear[:, None], fresh, logits)
    raise AssertionError(f"no logits with margins for {problem}")


def _near_epsilon(logits: np.ndarray, config: MoEConfig, bias: np.ndarray | None) -> np.ndarray:
    """[T] Whether the sum that renormalisation compares with its epsilon is within 1/1000 of it."""
    if not config.renormalize or config.renormalize_form == "add":
        return np.zeros(len(logits), dtype=bool)
    total = chosen_scores(logits, route(logits, config, bias).topk_ids, config).sum(axis=-1)
    return np.abs(total - config.renormalize_eps) < 1e-3 * config.renormalize_eps


def _logits(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    shape = (problem.tokens, problem.experts)
    if problem.logits == "ties":
        return np.copysign(rng.integers(-1, 2, shape).astype(float), rng.choice([-1.0, 1.0], shape))
    if problem.logits == "close":
        return round_to_nearest(1 + 1e-12 * rng.integers(-1, 2, shape), problem.routing_dtype)
    logits = rng.standard_normal(shape) * 2
    if problem.logits == "shifted":
        shifts = SHIFTS.get(problem.config.scoring, [100.0, -100.0])
        logits = logits + rng.choice(shifts, (problem.tokens, 1))
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
    weights = weigh(logits, slots, MoEConfig(problem.top_k)) * problem.factor("topk_weights")
    weights = round_to_nearest(weights, problem.routing_dtype)
    spoiled = rng.choice([math.nan, math.inf, 1.0], topk_ids.shape)
    return np.where(is_slot(topk_ids, problem.experts), weights, spoiled)
