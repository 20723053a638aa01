"""Wrong choices of experts, or wrong weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import layer_mutant
from moe_ref.conformance.wrapped import configured, experts, narrow
from moe_ref.expert_scale import scale_by_expert
from moe_ref.routing import (
    choice_keys,
    choose_groups,
    chosen_scores,
    divisor,
    group_keys,
    keys_of_groups,
    route,
    weigh,
)
from moe_ref.types import MoEWeights

if TYPE_CHECKING:
    from executors import Executor


@layer_mutant
def not_renormalised(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Renormalisation is forgotten (R5)."""
    return inner(x, logits, configured(weights, renormalize=False))


@layer_mutant
def renormalised_twice(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Weights are renormalised again after the scaling factor, which that undoes (R5)."""
    routing = route(logits, weights.config, weights.selection_bias)
    again = routing.topk_weights / routing.topk_weights.sum(dim=-1, keepdim=True)
    return experts(inner, x, routing.topk_ids, narrow(again, x), weights)


@layer_mutant
def renormalisation_without_gradient(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient of the logits leaves out the sum that the weights are divided by (D1)."""
    config = weights.config
    routing = route(logits, config, weights.selection_bias)
    scores = chosen_scores(logits.double(), routing.topk_ids, config)
    scale = (routing.topk_weights / scores).detach()
    return experts(inner, x, routing.topk_ids, narrow(scores * scale, x), weights)


@layer_mutant
def higher_id_wins_ties(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Among equal logits the higher id is chosen (R2)."""
    bias = weights.selection_bias
    routing = route(logits.flip(-1), weights.config, None if bias is None else bias.flip(0))
    return experts(inner, x, weights.num_experts - 1 - routing.topk_ids, narrow(routing.topk_weights, x), weights)


@layer_mutant
def logits_in_bf16(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Logits are rounded to bf16 before the choice (R1)."""
    return inner(x, logits.to(torch.bfloat16).to(logits.dtype), weights)


@layer_mutant
def choice_in_fp32(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Logits in fp64 are rounded to fp32 before the choice (R1)."""
    return inner(x, logits.to(torch.float32), weights)


@layer_mutant
def softmax_without_maximum(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The softmax does not subtract the largest logit first, so exp overflows in fp32 (R1)."""
    config = weights.config
    if not config.scoring.endswith("softmax"):
        return inner(x, logits, weights)
    routing = route(logits, config, weights.selection_bias)
    chosen = logits.float() if config.scoring == "softmax" else logits.float().gather(-1, routing.topk_ids)
    exponentials = chosen.exp()
    scores = exponentials / exponentials.sum(dim=-1, keepdim=True)
    scores = scores.gather(-1, routing.topk_ids) if config.scoring == "softmax" else scores
    return with_scores_chosen(inner, x, weights, routing.topk_ids, scores)


@layer_mutant
def scaling_factor_forgotten(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """routed_scaling_factor is left out (R5)."""
    return inner(x, logits, configured(weights, routed_scaling_factor=1.0))


@layer_mutant
def negative_logits_count_as_zero(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The search for the largest starts from 0, so that rows of negative logits are misrouted (R2)."""
    ids = route(logits.clamp(min=0), weights.config, weights.selection_bias).topk_ids
    return _with_ids(inner, x, logits, weights, ids)


@layer_mutant
def selection_bias_forgotten(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The choice is made without the bias (R3)."""
    return inner(x, logits, replace(weights, selection_bias=None))


@layer_mutant
def selection_bias_in_weights(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The weight is the key, score + bias, instead of the score (R3)."""
    ids = route(logits, weights.config, weights.selection_bias).topk_ids
    return _with_scores(inner, x, logits, weights, ids, lambda scores, bias: scores + bias)


@layer_mutant
def score_recovered_from_key(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The score is recovered as (score + bias) - bias, in fp32 (R3)."""
    ids = route(logits, weights.config, weights.selection_bias).topk_ids
    return _with_scores(inner, x, logits, weights, ids, lambda s, b: (s.float() + b.float()) - b.float())


@layer_mutant
def groups_ignored(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Experts are chosen from all groups (R2)."""
    return inner(x, logits, configured(weights, num_groups=1, topk_groups=1, group_score="max"))


@layer_mutant
def other_group_score(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Groups are chosen by their best expert instead of their best two (R2)."""
    return inner(x, logits, configured(weights, group_score="max"))


@layer_mutant
def other_groups_count_as_zero(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Experts outside the chosen groups have key 0 instead of -inf, and win against negative keys (R2)."""
    config = weights.config
    assert config.top_k is not None
    keys = choice_keys(logits.double(), config, weights.selection_bias)
    if config.num_groups > 1:
        inside = keys_of_groups(torch.zeros_like(keys), choose_groups(group_keys(keys, config), config)) == 0
        keys = torch.where(inside, keys, torch.zeros_like(keys))
    ids = keys.argsort(dim=-1, descending=True, stable=True)[:, : config.top_k]
    return _with_ids(inner, x, logits, weights, ids)


def _with_ids(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights, ids: Tensor) -> Tensor:
    own = weigh(logits.double(), ids, weights.config, expert_scale=weights.expert_scale)
    return experts(inner, x, ids, narrow(own, x), weights)


def _with_scores(
    inner: Executor,
    x: Tensor,
    logits: Tensor,
    weights: MoEWeights,
    ids: Tensor,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Runs the layer with changed scores if there is a selection bias."""
    config, bias = weights.config, weights.selection_bias
    if bias is None:
        return inner(x, logits, weights)
    scores = change(chosen_scores(logits.double(), ids, config), bias.detach().double()[ids]).double()
    return with_scores_chosen(inner, x, weights, ids, scores)


def with_scores_chosen(inner: Executor, x: Tensor, weights: MoEWeights, ids: Tensor, scores: Tensor) -> Tensor:
    """Runs the layer with these scores of the chosen experts."""
    config = weights.config
    if config.renormalize:
        scores = scores / divisor(scores.sum(dim=-1, keepdim=True), config)
    own = scale_by_expert(scores.double() * config.routed_scaling_factor, ids, weights.expert_scale)
    return experts(inner, x, ids, narrow(own, x), weights)
