"""From logits to ids and weights: R1 to R5, R9; ties, masks, groups, biases, broken rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.pinned import ERNIE, GEMMA, KOLIBRI
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.cases.case import Case, layer, of
from moe_ref.conformance.vectors.contents import Route
from moe_ref.conformance.vectors.layers import Layer
from moe_ref.routing import choose
from moe_ref.types import MoEConfig, MoEWeights

INF, NAN = math.inf, math.nan
SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
# Rows that one call of each scoring must survive: NaN, +inf, nothing but -inf, some -inf, zeros of both signs, far out.
ROWS = np.array(
    [
        [NAN, 1.0, 2.0, 0.5, -1.0],
        [INF, 1.0, 2.0, 0.5, -1.0],
        [-INF, -INF, -INF, -INF, -INF],
        [-INF, 1.0, -INF, -INF, -INF],
        [0.0, -0.0, 0.0, -0.0, 0.0],
        [100.0, 100.0, 99.0, -100.0, 100.0],
        [-100.0, -101.0, -100.0, -102.0, -100.0],
        [1.0, 1.0 + 2.0**-20, 1.0 + 2.0**-23, 1.0, 1.0 - 2.0**-24],
    ]
)
BIAS = np.array([0.25, -0.5, 0.125, 0.0, 1.0])
# Eight experts whose keys are close: the second row has groups that tie, the third whole rows that tie.
CLOSE = np.array(
    [
        [0.5, 0.5 + 2.0**-22, 0.5, 0.25, 0.5 - 2.0**-22, 0.5, -1.0, 0.0],
        [3.0, -1.0, 3.0, -1.0, 1.0, 1.0, -2.0, -2.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [-INF, 2.0, -INF, -INF, 1.0, -INF, -INF, 0.0],
        [NAN, 2.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0],
    ]
)


def _route(name: str, clauses: str, says: str, logits: Any, config: MoEConfig, **more: Any) -> Case:
    return of(name, clauses, says, Route(np.array(logits, dtype=np.float64), config, **more))


def _kinds(top_k: int, **more: Any) -> dict[str, MoEConfig]:
    return {scoring: MoEConfig(top_k, scoring=scoring, **more) for scoring in SCORINGS}  # type: ignore[arg-type]


def _ties() -> list[Case]:
    cases = [
        layer(
            f"ties-{scoring}",
            "R2 D5",
            "Logits are -1, 0, -0 and 1: equal keys choose the lower id, and gradients go to what was chosen.",
            config,
            "6 5 8 5",
            logits="ties",
            seed=number,
        )
        for number, (scoring, config) in enumerate(_kinds(3).items())
    ]
    says = "Keys are computed, and differ by less than their rounding: several choices are right."
    for scoring in ("softmax", "sigmoid"):
        for score in ("max", "top2_sum"):
            config = MoEConfig(2, scoring=scoring, num_groups=4, topk_groups=2, group_score=score)
            cases.append(_route(f"choices-{scoring}-{score}", "R2", says, CLOSE, config))
    biased = MoEConfig(3, scoring="sigmoid")
    cases.append(_route("choices-bias", "R2 R3", says, CLOSE, biased, selection_bias=np.zeros(8, dtype=np.float32)))
    groups = MoEConfig(2, scoring="topk_softmax", num_groups=2, topk_groups=1, group_score="top2_sum")
    cases.append(_route("choices-groups-logit", "R2", says, CLOSE, groups))
    short = MoEConfig(3, scoring="sigmoid", num_groups=2, topk_groups=1)
    says = "The kept group has one finite key: experts outside tie with its others at -inf, and the lower id wins."
    cases.append(_route("group-with-one-finite-key", "R2 R4", says, [[-INF, -INF, 1.0, 0.5, -INF, 0.75]], short))
    return cases


def _rows() -> list[Case]:
    cases = [
        _route(
            f"rows-{scoring}",
            "R1 R2 R4",
            "Broken rows, masks, zeros of both signs, numbers far out and neighbours of 1, one row each.",
            ROWS,
            config,
            dtype="float64",
        )
        for scoring, config in _kinds(3, routed_scaling_factor=2.5).items()
    ]
    for scoring, config in _kinds(2).items():
        broken: dict[str, Any] = {"logits": "masked", "broken_logits": 3, "seed": 7}
        says = "NaN, +inf and nothing but -inf, each in a row of its own, stay in their token."
        cases.append(layer(f"broken-{scoring}", "R4", says, config, "6 4 7 3", **broken))
    says = "A NaN in x and a NaN in the logits stay in their tokens, with renormalisation and a bias."
    config = MoEConfig(2, scoring="sigmoid", renormalize=True)
    fields: dict[str, Any] = {"broken_logits": 1, "broken_x": 1, "down_bias": True, "seed": 3}
    cases.append(layer("broken-x-and-logits", "R4", says, config, "7 5 8 5", **fields))
    cases.append(
        layer(
            "group-of-minus-infinity",
            "R4",
            "Two experts are chosen out of a group of one finite logit, or none: then the softmax is undefined.",
            MoEConfig(1, scoring="topk_softmax", num_groups=3, topk_groups=1, group_score="top2_sum"),
            "8 6 1 4",
            logits="masked",
        )
    )
    return cases


def _scores() -> list[Case]:
    cases = [
        layer(
            f"shifted-{scoring}",
            "R1",
            "Rows around +100 and -100 (or -50): no score overflows or loses its digits.",
            config,
            "6 5 8 3",
            logits="shifted",
            seed=number,
        )
        for number, (scoring, config) in enumerate(_kinds(2, renormalize=True).items())
    ]
    says = "Logits in fp64 differ by 1e-12 beside x in bf16: they are read exactly."
    config = MoEConfig(2)
    fields: dict[str, Any] = {"routing_dtype": "float64", "logits": "close", "seed": 1}
    cases.append(layer("logits-in-fp64", "R1 T1", says, config, "6 5 8 3", dtype="bfloat16", **fields))
    says = "Logits in bf16, many of which tie."
    cases.append(layer("logits-in-bf16", "R1 R2 T1", says, config, "6 5 8 3", routing_dtype="bfloat16", seed=2))
    return cases


def _biases() -> list[Case]:
    cases = []
    for number, (name, config) in enumerate(
        {
            "softmax": MoEConfig(2),
            "topk-softmax": MoEConfig(2, scoring="topk_softmax"),
            "sigmoid-renormalised": MoEConfig(3, scoring="sigmoid", renormalize=True, routed_scaling_factor=2.5),
            "logit": KOLIBRI,
        }.items()
    ):
        for size in ("small", "large"):
            says = "The selection bias moves the choice, and is in no weight."
            fields: dict[str, Any] = {"selection_bias": size, "margins": True, "seed": 10 + number}
            cases.append(layer(f"bias-{size}-{name}", "R3 R2", says, config, "5 6 8 3", **fields))
    grouped = MoEConfig(2, scoring="sigmoid", renormalize=True, num_groups=2, topk_groups=1, group_score="top2_sum")
    says = "A selection bias within groups, as in DeepSeek-V3."
    fields = {"selection_bias": "small", "margins": True, "seed": 20}
    cases.append(layer("bias-within-groups", "R3 R2", says, grouped, "6 8 8 3", **fields))
    says = "The larger of a group's keys decides, and its members' logits do not leave it."
    softmax = MoEConfig(2, num_groups=4, topk_groups=2)
    cases.append(layer("groups-max", "R2", says, softmax, "6 8 8 3", margins=True, seed=21))
    says = "A bias on the logit, beside logits of -inf, which keep the key -inf."
    kolibri = MoEConfig(3, scoring="sigmoid", renormalize=True, selection_key="logit")
    cases.append(_route("bias-on-logit-rows", "R3 R4", says, ROWS, kolibri, selection_bias=BIAS))
    plain = MoEConfig(3, scoring="sqrtsoftplus")
    cases.append(
        _route("bias-on-score-rows", "R3 R4", says.replace("logit,", "score,"), ROWS, plain, selection_bias=BIAS)
    )
    return cases


def _renormalised() -> list[Case]:
    cases = []
    for form in ("add", "max"):
        for eps in (1e-20, 0.7):
            config = MoEConfig(2, renormalize=True, renormalize_eps=eps, renormalize_form=form)
            says = (
                f"Weights are divided by {'their sum + eps' if form == 'add' else 'the larger of their sum and eps'}."
            )
            name = f"renormalised-{form}-{'large' if eps > 0.1 else 'small'}-eps"
            cases.append(layer(name, "R5", says, config, "6 6 8 3", seed=30))
    says = "All chosen scores are 0: the weights are 0, not 0/0."
    zeros = MoEConfig(2, scoring="sigmoid", renormalize=True)
    cases.append(_route("renormalised-zero-sum", "R5 R4", says, [[-INF] * 3, [-INF, 0.0, -INF]], zeros))
    for eps, name in ((0.25, "sum-above-eps"), (0.5, "sum-equals-eps"), (1.0, "sum-below-eps")):
        config = MoEConfig(1, renormalize=True, renormalize_eps=eps, renormalize_form="max")
        logits, x = np.zeros((1, 2)), np.array([[1.0, -0.5]])
        weights = MoEWeights(np.full((2, 2, 2), 0.5), np.full((2, 2, 1), 0.75), config=config)
        problem = Problem(1, 2, 2, 1, config)
        arrays = Arrays(x, np.ones_like(x), choose(logits, config), logits, None, weights)
        says = f"The sum of scores is exactly 0.5, and eps is {eps}: at equality the divisor is the sum."
        cases.append(of(f"renormalised-max-{name}", "R5", says, Layer(problem, arrays)))
    cases.append(layer("ernie", "R5", "ERNIE's routing.", ERNIE, "4 8 8 3", dtype="bfloat16", seed=31))
    return cases


def _scaled() -> list[Case]:
    fields: dict[str, Any] = {"expert_scale": True, "bias_dtype": "bfloat16"}
    gemma = MoEConfig(2, renormalize=True, renormalize_eps=0.1, activation="geglu_tanh", routed_scaling_factor=2.5)
    says = "Each weight is multiplied by its expert's scale, last; experts that nobody chose have a gradient of 0."
    cases = [
        layer("expert-scale", "R9 D2", says, gemma, "3 8 8 3", dtype="bfloat16", **fields, seed=40),
        layer("expert-scale-broken", "R9 R4", says, gemma, "6 4 8 3", **fields, broken_logits=2, broken_x=1, seed=41),
    ]
    says = "The caller gives the weights, and the scales are ignored."
    frozen = frozenset({"expert_scale"})
    cases.append(
        layer("expert-scale-ignored", "R9 R7", says, GEMMA, "3 8 8 3", entry="experts", **fields, frozen=frozen)
    )
    says = "Nobody chooses the expert whose scale is NaN."
    config = MoEConfig(2, renormalize=True)
    scale = np.array([2.0, 10.0, NAN])
    cases.append(_route("expert-scale-nan", "R9", says, [[1.0, 0.0, -1.0]], config, expert_scale=scale))
    return cases


def cases() -> list[Case]:
    """All of them."""
    return [*_ties(), *_rows(), *_scores(), *_biases(), *_renormalised(), *_scaled()]
