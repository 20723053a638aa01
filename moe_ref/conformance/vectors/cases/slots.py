"""Slots that others chose: R6, R7, R8, G1, E5; empty slots, duplicates, ranks of expert parallelism."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.cases.case import Case, layer, of
from moe_ref.conformance.vectors.layers import Layer
from moe_ref.types import MoEConfig

TWO = MoEConfig(2)


def _given(name: str, clauses: str, says: str, ids: Any, weights: Any, sizes: str = "4 4 8 3", **fields: Any) -> Case:
    """A layer with these ids and weights."""
    tokens, experts, hidden, inner = map(int, sizes.split())
    problem = Problem(tokens, experts, hidden, inner, MoEConfig(1), entry="experts", **fields)
    arrays, config = build(problem), MoEConfig(len(ids[0]))
    given = {"topk_ids": np.array(ids), "topk_weights": np.array(weights, dtype=np.float64)}
    arrays = replace(arrays, **given, weights=replace(arrays.weights, config=config))
    problem = replace(problem, config=config)
    return of(name, clauses, says, Layer(problem, arrays))


def _rank(name: str, first: int, last: int) -> Case:
    """Some experts of a layer of eight, whose configuration and selection bias are those of all."""
    config = MoEConfig(4, scoring="sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum")
    whole = build(Problem(4, 8, 8, 3, config, entry="experts", down_bias=True, seed=5))
    weights = whole.weights.map(lambda array: array[first:last])
    weights = replace(weights, selection_bias=np.linspace(-1, 1, 8).astype(np.float32).astype(np.float64))
    arrays: Arrays = replace(whole, topk_ids=whole.topk_ids - first, weights=weights)
    problem = Problem(4, last - first, 8, 3, config, entry="experts", down_bias=True, selection_bias="small", seed=5)
    says = "A rank of expert parallelism: K, groups and the selection bias are those of all experts, not of its few."
    return of(name, "R8 R7", says, Layer(problem, arrays))


def _empty() -> list[Case]:
    nan, inf = math.nan, math.inf
    says = "Ids outside [0, E) are empty slots, and add exactly 0 whatever their weight: NaN and infinities."
    ids = [[-1, 2, 4], [0, -1, 4], [-1, -1, -1], [3, 9, 0]]
    weights = [[nan, 0.5, inf], [0.25, nan, -inf], [nan, nan, nan], [0.125, nan, 2.0]]
    cases = [
        _given("empty-slots", "R7 G1", says, ids, weights, down_bias=True),
        _given("empty-slots-int32", "R7 T1", says, ids, weights, ids_dtype="int32", dtype="bfloat16"),
        _given("empty-slots-only", "R7 E3", "No slot names an expert.", [[-1], [4], [-1], [7]], [[nan]] * 4),
    ]
    says = "Ids that name an expert if only their lower 32 bits are read: they are empty."
    far = [[2**32, 1], [2**32 + 2, -(2**31)], [-(2**32), 3], [2**62 + 1, 0]]
    cases.append(_given("ids-past-32-bits", "E5 R7", says, far, np.full((4, 2), 0.5)))
    says = "The least and the largest ids that there are: a difference of two is past 64 bits."
    ends = [[2**63 - 1, 1], [-(2**63), 2], [2**31, 3], [2**31 - 1, 0]]
    cases.append(_given("ids-at-the-ends", "E5 R7", says, ends, np.full((4, 2), 0.5), dtype="float16"))
    return cases


def _grouped() -> list[Case]:
    third = np.full((4, 3), 0.25)
    says = "Duplicates in a row add up, and keep their order in their group."
    cases = [
        _given("duplicates", "R7 G1", says, [[2, 2, 2], [0, 3, 0], [1, 2, 1], [3, 3, 0]], third, gate_up_bias=True),
        _given("one-expert-has-all", "G1 D2", "One expert has all slots, the others none.", [[2]] * 4, [[0.5]] * 4),
    ]
    says = "Group sizes are cut points drawn with replacement: many experts are empty, and rows have duplicates."
    fields: dict[str, Any] = {"entry": "experts", "cut_points": True}
    cases.append(layer("cut-points", "G1 D2 E3", says, MoEConfig(3), "5 7 8 3", **fields, seed=2))
    cases.append(layer("cut-points-empty", "G1 R7", says, TWO, "6 9 8 3", **fields, empty_slots=True, seed=3))
    says = "More slots a token than there are experts, which ids that are given may have."
    cases.append(_given("more-slots-than-experts", "R7 R8", says, [[0, 1, 0]] * 4, third, "4 2 8 3"))
    return cases


def _weights() -> list[Case]:
    says = "Weights of many digits beside x in 16 bits: they are not rounded to x's dtype."
    fields: dict[str, Any] = {"routing_dtype": "float64", "dy_layout": "scalar"}
    config = MoEConfig(1, scoring="sigmoid", routed_scaling_factor=2.5)
    cases = [
        layer("weights-beside-bf16", "R6 T1", says, config, "64 2 8 3", dtype="bfloat16", **fields, seed=4),
        layer("weights-beside-fp16", "R6 T1", says, config, "64 2 8 3", dtype="float16", **fields, seed=5),
    ]
    says = "Weights of 0: the gradient of a weight must not be had by dividing by it."
    zeros = [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.5, 0.0]]
    ids = [[0, 1], [2, 3], [1, 2], [3, 0]]
    both: dict[str, Any] = {"gate_up_bias": True, "down_bias": True}
    cases.append(_given("weights-of-zero", "D3 D1", says, ids, zeros, **both))
    cases.append(_given("weights-of-zero-adapted", "D3 E6", says, ids, zeros, **both, down_rank=2))
    return cases


def cases() -> list[Case]:
    """All of them."""
    return [
        *_empty(),
        *_grouped(),
        *_weights(),
        _rank("rank-of-one-expert", 2, 3),
        _rank("rank-of-three-experts", 5, 8),
    ]
