"""Whether a router did what a rule says: its choice within the last bits of fp32, its weights within error bars."""

import numpy as np
from torch import Tensor

from executors.hf import RouterRule
from executors.hf.router_rules import ZEROED
from moe_ref.conformance.judgement.choices import UNIT, admissible
from moe_ref.conformance.judgement.gates import judge
from moe_ref.error_bars import KINDS, Part, TensorBars
from moe_ref.numerics import FORMATS, Perturbed, Rounding
from moe_ref.routing import (
    choice_keys,
    choose,
    choose_groups,
    chosen_scores,
    group_keys,
    keys_are_rounded,
    keys_of_groups,
    scale_by_expert,
    weigh,
)
from moe_ref.samples import Measured, Recorded, Replayed
from moe_ref.types import MoEConfig
from router_cases import Routed

SAMPLES = 16
FP32 = FORMATS["float32"]
TIES = 16 * FP32.unit_roundoff  # relative: how near two scores may be that a router in fp32 takes for equal


def fault(routed: Routed, rule: RouterRule) -> str:
    """What is wrong, in one line, or ""."""
    config, bias = rule.config, bias_of(rule)
    logits, ids, size = logits_of(routed, rule), routed.ids, routed.logits.shape[1]
    if ids.shape[1] != config.top_k:
        return f"{ids.shape[1]} experts for each token, and {config.top_k} in the rule"
    ordered = np.sort(ids, axis=1)
    if ordered.min() < 0 or ordered.max() >= size or (ordered[:, 1:] == ordered[:, :-1]).any():
        return "ids are out of range, or not distinct"
    right = is_right_choice(routed, rule)
    judged = right | is_certain(logits, rule)
    if not right[judged].all():
        t = int(np.flatnonzero(judged & ~right)[0])
        must = choose(logits[t : t + 1], config, bias)[0]
        return f"token {t}: chose {sorted(ids[t].tolist())}, but must choose {sorted(must.tolist())}"
    if None not in (routed.output, rule.output_scale) and not np.isclose(routed.output, rule.output_scale, 1e-6, 0):
        return f"the block multiplies by {routed.output}, and the rule by {rule.output_scale}"
    judged &= underflows_not(logits, ids, config)
    bars = weight_bars(logits, ids, rule)
    return judge("topk_weights", routed.weights, bars, "float32", "float32", judged=judged).failure


def is_right_choice(routed: Routed, rule: RouterRule) -> np.ndarray:
    """[T] Whether the ids, in whatever order, are a right choice for a router that computes scores in fp32.

    With a selection bias or groups that is the specification's own rule. Without, where its keys are the logits, a
    router that chooses by scores may take near scores for equal.
    """
    config, bias, logits = rule.config, bias_of(rule), logits_of(routed, rule)
    if keys_are_rounded(config, bias) or config.scoring == "topk_softmax":
        keys = choice_keys(logits, config, bias)
        ids = np.sort(routed.ids, axis=1)
        ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(keys, ids, 1), axis=1, kind="stable"), 1)
        right = (ids == choose(logits, config, bias)).all(axis=1)
        right[~right] = admissible(ids[~right], logits[~right], config, bias)
        return right
    everything = np.broadcast_to(np.arange(logits.shape[1]), logits.shape)
    scores = chosen_scores(logits, everything, config)
    chosen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(chosen, routed.ids, True, axis=1)
    least = np.where(chosen, scores, np.inf).min(axis=1)
    others = np.where(chosen, -np.inf, scores).max(axis=1)
    return others * (1 - TIES) <= least + FP32.smallest_normal


def is_certain(logits: np.ndarray, rule: RouterRule) -> np.ndarray:
    """[T] Whether the rule must hold; everywhere, but for routers whose note makes a condition: that keys are positive.

    Such a token counts if top_k keys in the kept groups are positive, more clearly than an error of fp32.
    """
    if ZEROED not in rule.note:
        return np.ones(len(logits), dtype=bool)
    config, bias = rule.config, bias_of(rule)
    keys = choice_keys(logits, config, bias)
    slack = FP32.smallest_normal if bias is None else 2 * UNIT * max(1.0, float(np.abs(bias).max()))
    kept = choose_groups(group_keys(keys, config), config)
    best = -np.sort(-keys_of_groups(keys, kept), axis=1)
    return best[:, config.top_k - 1] > slack


def underflows_not(logits: np.ndarray, ids: np.ndarray, config: MoEConfig) -> np.ndarray:
    """[T] Whether all chosen scores are normal numbers of fp32, for routers that divide by max(sum, eps).

    A bias may choose scores of which none is normal. Such a divisor then enlarges their underflow.
    """
    if config.renormalize_form == "add":
        return np.ones(len(logits), dtype=bool)
    return (chosen_scores(logits, ids, config) >= FP32.smallest_normal).all(axis=1)


def logits_of(routed: Routed, rule: RouterRule) -> np.ndarray:
    """What `moe_ref.route` starts from: what the router returned, or its logarithm."""
    if rule.returns == "logits":
        return routed.logits
    with np.errstate(divide="ignore"):  # of 0, which a softmax in fp32 underflows to
        return np.log(routed.logits)


def bias_of(rule: RouterRule) -> np.ndarray | None:
    """The selection bias in float64."""
    return _wide(rule.selection_bias)


def scale_of(rule: RouterRule) -> np.ndarray | None:
    """The scales of experts in float64."""
    return _wide(rule.expert_scale)


def _wide(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy()


def weight_bars(logits: np.ndarray, ids: np.ndarray, rule: RouterRule) -> TensorBars:
    """The exact weights of these experts, and how far honest ones may stray: sampled, as all error bars are."""

    def run(rounding: Rounding) -> np.ndarray:
        weights = weigh(logits[None], ids, rule.config, rounding)
        return np.asarray(scale_by_expert(weights, ids, scale_of(rule), rounding))

    recorded = Recorded()
    exact = run(recorded)[0]
    measured = Measured(exact, 0)
    parts = {}
    for kind in KINDS:
        errors = Perturbed(kind, SAMPLES, floor=FP32.smallest_normal)
        sums = measured.sums(run(errors if kind == "storage" else Replayed(errors, recorded)), errors.scale, SAMPLES)
        parts[kind] = Part(sums.squares / SAMPLES, sums.gains, sums.probes)
    return TensorBars(exact, parts["storage"], parts["accumulation"], measured.probed)
