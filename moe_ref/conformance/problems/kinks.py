"""Keeps pre-activations off an activation's kinks: the clamp's limit, where the derivative jumps, and squared ReLU's 0.

Where the clamp comes after the activation, its kink is where act(g) is the limit. Softcaps have none.

Rounding may carry an honest executor across a kink, where no error bar reaches.
"""

from __future__ import annotations

import numpy as np

from moe_ref.activations import act, split_gate_up
from moe_ref.blocks import blocks_of
from moe_ref.experts import expert, linear, lora_inner
from moe_ref.layer import gather, row_weights
from moe_ref.numerics import EXACT, FORMATS, round_to_nearest
from moe_ref.types import MoEConfig, MoEWeights

ACCUMULATED = 1e-5  # above the error of an fp32 sum of a few thousand terms of O(1)
ROUNDED = 6.0  # deviations of a sum of rounded terms
FLAT = 0.1  # a slope of act(g), below which it is held to be as steep as that


def clear_of_kinks(
    x: np.ndarray,
    dy: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    weights: MoEWeights,
    dtype: str,
    equal_rows: tuple[bool, bool] = (False, False),
    size: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Moves tokens whose pre-activations are so near a kink that rounding might carry them across.

    A token that cannot be moved clear gets an upstream gradient of zero: its forward pass still counts, but it affects
    no gradient.

    Args:
        x: [T, H] float64.
        dy: [T, H] float64.
        topk_ids: [T, K].
        topk_weights: [T, K].
        weights: the layer's parameters, float64.
        dtype: x's dtype.
        equal_rows: whether all rows of x, and all rows of dy, are equal and must stay so.
        size: the order of magnitude of the largest pre-activations.

    Returns:
        x and dy.
    """
    arguments = topk_ids, np.nan_to_num(topk_weights, nan=1.0), weights, dtype, size
    for _ in range(6):
        push = pushes_off_kinks(x, *arguments)
        if equal_rows[0] and len(push):
            push = np.repeat(push.sum(axis=0, keepdims=True), len(push), axis=0)
        if not push.any():
            return x, dy
        x = round_to_nearest(x + push, dtype)
    near = np.count_nonzero(pushes_off_kinks(x, *arguments), axis=1, keepdims=True)
    if equal_rows[1]:
        near = near.sum(axis=0, keepdims=True)
    return x, np.where(near > 0, 0.0, dy)


def pushes_off_kinks(
    x: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    weights: MoEWeights,
    dtype: str,
    size: float = 1.0,
) -> np.ndarray:
    """The smallest step for each token that takes its pre-activations out of the kinks' margin.

    Args:
        x: [T, H] float64.
        topk_ids: [T, K].
        topk_weights: [T, K]; used only where they scale the input.
        weights: the layer's parameters, float64.
        dtype: the dtype in which an implementation stores; its rounding gives the margin.
        size: as for `clear_of_kinks`.

    Returns:
        [T, H], zero for a token clear of kinks, and for a layer without kinks.
    """
    config = weights.config
    push = np.zeros_like(x)
    if config.limit is None and config.activation != "relu2":
        return push
    u = FORMATS[dtype].unit_roundoff
    slots = gather(x, topk_ids, topk_weights, weights)
    scale = row_weights(slots.weights, slots.grouping) if config.scale_input else np.ones((len(slots.rows), 1))
    for block in blocks_of(slots.grouping.group_offsets, len(slots.rows)):
        tokens = slots.grouping.order[block.rows] // topk_ids.shape[1]
        parameters, rows = expert(weights, block.index).up, block.take(slots.rows)
        z = linear("gate_up", "z", rows, parameters)
        product = rows @ parameters.matrix.T
        margin = 2 * u * (np.abs(product) + np.abs(z) + (config.limit or 0.0)) + size * ACCUMULATED
        if config.scale_input:
            margin += ROUNDED * u * np.sqrt(rows**2 @ parameters.matrix.T**2)
        if parameters.lora_a is not None and parameters.lora_b is not None:
            inner = lora_inner("gate_up", rows, parameters, EXACT)
            b = parameters.lora_b.T
            margin += 2 * u * np.abs(inner @ b) + ROUNDED * u * np.sqrt(inner**2 @ b**2)
        for step, features in _steps(z, margin, parameters.matrix.T, config, u):
            near = step.any(axis=1)
            if near.any():
                moved = step[near] @ (features / np.maximum((features**2).sum(axis=0), 1e-6)).T
                np.add.at(push, tokens[near], moved / np.maximum(block.take(scale)[near], 0.1))
    return push


def _steps(
    z: np.ndarray, margin: np.ndarray, features: np.ndarray, config: MoEConfig, u: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each kink: how far each pre-activation must move, and the features along which it moves.

    ``u`` is the unit roundoff of x's dtype.
    """
    if config.limit is None:
        return [(_step(z, margin), features)]
    (gate, up), (gate_margin, up_margin) = split_gate_up(z, config), split_gate_up(margin, config)
    gate_features, up_features = split_gate_up(features, config)
    late = config.clamp == "after"
    of_gate = _late_step(gate, gate_margin, config, u) if late else _step(gate - config.limit, gate_margin)
    return [
        (of_gate, gate_features),
        (_step(up - config.limit, up_margin), up_features),
        (_step(up + config.limit, up_margin), up_features),
    ]


def _late_step(gate: np.ndarray, margin: np.ndarray, config: MoEConfig, u: float) -> np.ndarray:
    """How far to move for a clamp of act(g): twice the margin, if act(g) meets the limit within it; else 0."""
    assert config.limit is not None
    curve = act(gate, config)
    margin = margin + ROUNDED * u * config.limit / np.maximum(np.abs(curve.slope), FLAT)  # act(g) is rounded too
    around = [act(gate - margin, config).value, curve.value, act(gate + margin, config).value]
    near = (np.min(around, axis=0) <= config.limit) & (np.max(around, axis=0) >= config.limit)
    upwards = (curve.value >= config.limit) == (curve.slope >= 0)
    return np.where(near, np.where(upwards, 2.0, -2.0) * margin, 0.0)


def _step(distance: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """How far to move: twice the margin, away from the limit, if the distance is below the margin; else 0."""
    return np.where(np.abs(distance) < margin, np.where(distance < 0, -2.0, 2.0) * margin, 0.0)
