"""Numbers of a fixed layer in the sizes and dtypes that an executor declares: zeros beside them add exactly nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moe_ref.activations import split_gate_up
from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.declared import fitted
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig, MoEWeights

if TYPE_CHECKING:
    from executors import Capabilities


def aligned(problem: Problem, arrays: Arrays, able: Capabilities) -> tuple[Problem, Arrays]:
    """A problem of dense weights in declared sizes, strides and dtypes, with the same features and the same numbers.

    The dtypes of other arguments than x become others only if they hold the numbers exactly. Features in H and I that
    are added have zeros everywhere: in x, dy, projections, biases and adapters; so no sum changes.
    """
    form = fitted(problem, able)
    weights = arrays.weights
    layout = form.config.gate_up_layout
    if (form.hidden, form.intermediate, layout) != (
        problem.hidden,
        problem.intermediate,
        problem.config.gate_up_layout,
    ):
        config = replace(problem.config, gate_up_layout=layout)
        weights = replace(_padded(weights, problem, form, config), config=config)
    wide = [(0, 0), (0, form.hidden - problem.hidden)]
    arrays = replace(arrays, x=np.pad(arrays.x, wide), dy=np.pad(arrays.dy, wide), weights=weights)
    kept = replace(
        problem,
        hidden=form.hidden,
        intermediate=form.intermediate,
        config=weights.config,
        ids_dtype=form.ids_dtype,
        bias_dtype=form.bias_dtype,
        routing_dtype=form.routing_dtype,
        lora_dtype=form.lora_dtype,
        x_layout=form.x_layout,
        weights_layout=form.weights_layout,
        routing_layout=form.routing_layout,
    )
    return kept, arrays


def _padded(weights: MoEWeights, problem: Problem, form: Problem, config: MoEConfig) -> MoEWeights:
    """The layer with zeros in new features of H and I, and rows of gate and up as the configuration lays them."""
    more_h, more_i = form.hidden - problem.hidden, form.intermediate - problem.intermediate
    wider = {  # by how much the last axes grow; rows of gate and up come after
        "gate_up_proj": [0, more_h],
        "down_proj": [more_h, more_i],
        "gate_up_proj_bias": [0],
        "down_proj_bias": [more_h],
        "gate_up_lora_a": [0, more_h],
        "gate_up_lora_b": [0, 0],
        "down_lora_a": [0, more_i],
        "down_lora_b": [more_h, 0],
        "expert_scale": [],
        "post_expert_norm": [more_h],
    }
    changed = {}
    for name, value in weights.parameters().items():
        grown = np.pad(value, [(0, 0)] * (value.ndim - len(wider[name])) + [(0, more) for more in wider[name]])
        if name in ("gate_up_proj", "gate_up_proj_bias", "gate_up_lora_b"):
            grown = _with_rows(grown, problem.config, config, more_i)
        changed[name] = grown
    return weights.with_parameters(changed)


def _with_rows(stack: np.ndarray, before: MoEConfig, after: MoEConfig, more: int) -> np.ndarray:
    """[E, J, ...]: each half of J with ``more`` rows of zeros, in another layout."""
    moved = np.moveaxis(stack, 1, -1)
    given: tuple[np.ndarray, ...] = split_gate_up(moved, before) if before.gated else (moved,)
    halves = tuple(np.pad(half, [(0, 0)] * (half.ndim - 1) + [(0, more)]) for half in given)
    if len(halves) == 1:
        rows = halves[0]
    elif after.gate_up_layout == "interleaved":
        rows = np.stack(halves, axis=-1).reshape(*halves[0].shape[:-1], -1)
    else:
        rows = np.concatenate(halves, axis=-1)
    return np.moveaxis(rows, -1, 1)
