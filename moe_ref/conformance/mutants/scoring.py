"""Wrong scores, keys, epsilons and scales, of families that differ from the common form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

from moe_ref.conformance.mutants._registry import layer_mutant, slot_mutant
from moe_ref.conformance.mutants.routing import with_scores_chosen
from moe_ref.conformance.wrapped import configured, experts, narrow
from moe_ref.expert_scale import scale_by_expert
from moe_ref.routing import chosen_scores, divisor, route
from moe_ref.types import MoEWeights

if TYPE_CHECKING:
    from executors import Executor


@layer_mutant
def softplus_without_square_root(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The score of "sqrtsoftplus" is log(1 + exp(logit)) (R2)."""
    return _with_sqrtsoftplus(inner, x, logits, weights, lambda chosen: softplus(chosen, threshold=40.0))


@layer_mutant
def sigmoid_for_sqrtsoftplus(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The score of "sqrtsoftplus" is the sigmoid, as in the family's earlier models (R2)."""
    return _with_sqrtsoftplus(inner, x, logits, weights, torch.sigmoid)


@layer_mutant
def softplus_without_log1p(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Softplus is log(1 + exp(logit)) as written, in fp32: 0 for logits below -17, infinite above 88 (R1)."""
    return _with_sqrtsoftplus(inner, x, logits, weights, lambda chosen: (1 + chosen.float().exp()).log().sqrt())


@layer_mutant
def square_root_of_zero(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient of a logit of -inf is that of the square root at 0, infinite, times 0: NaN (D1)."""
    return _with_sqrtsoftplus(inner, x, logits, weights, lambda chosen: softplus(chosen, threshold=40.0).sqrt())


@layer_mutant
def selection_bias_on_other_key(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The selection bias is added to the score instead of the logit, or to the logit instead of the score (R3)."""
    other = "score" if weights.config.selection_key == "logit" else "logit"
    ids = route(logits, configured(weights, selection_key=other).config, weights.selection_bias).topk_ids
    scores = chosen_scores(logits.double(), ids, weights.config)
    return with_scores_chosen(inner, x, weights, ids, scores)


@layer_mutant
def weight_of_biased_logit(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The weight is the score of the logit + bias by which the expert was chosen (R3)."""
    bias = weights.selection_bias
    if bias is None or weights.config.selection_key == "score":
        return inner(x, logits, weights)
    ids = route(logits, weights.config, bias).topk_ids
    return with_scores_chosen(
        inner, x, weights, ids, chosen_scores(logits.double() + bias.detach(), ids, weights.config)
    )


@layer_mutant
def epsilon_added_for_maximum(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The sum is divided by sum + eps instead of max(sum, eps) (R5)."""
    return inner(x, logits, configured(weights, renormalize_form="add"))


@layer_mutant
def maximum_for_epsilon_added(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The sum is divided by max(sum, eps) instead of sum + eps (R5)."""
    return inner(x, logits, configured(weights, renormalize_form="max"))


@layer_mutant
def epsilon_with_gradient_of_sum(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Where max(sum, eps) is eps, the gradient is that of the sum all the same (R5)."""
    config = weights.config
    if not config.renormalize or config.renormalize_form == "add":
        return inner(x, logits, weights)
    ids = route(logits, config, weights.selection_bias).topk_ids
    scores = chosen_scores(logits.double(), ids, config)
    total = scores.sum(dim=-1, keepdim=True)
    total = total + (divisor(total, config) - total).detach()
    return experts(inner, x, ids, narrow(scores / total * config.routed_scaling_factor, x), weights)


@layer_mutant
def expert_scale_forgotten(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The weights are not multiplied by the experts' scales (R9)."""
    return _with_scales(inner, x, logits, weights, lambda scale: 1 + 0 * scale)


@layer_mutant
def expert_scale_with_twice_its_gradient(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The output is right, and the gradient of the scales twice what it is (R9, D1)."""
    return _with_scales(inner, x, logits, weights, lambda scale: scale + (scale - scale.detach()))


@layer_mutant
def expert_scale_of_next_expert(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The scales are read one expert off (R9)."""
    return _with_scales(inner, x, logits, weights, lambda scale: scale.roll(1))


@layer_mutant
def expert_scale_before_renormalisation(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The scores are scaled before their sum is taken (R9)."""
    config = weights.config
    if weights.expert_scale is None or not config.renormalize:
        return inner(x, logits, weights)
    ids = route(logits, config, weights.selection_bias).topk_ids
    scores = scale_by_expert(chosen_scores(logits.double(), ids, config), ids, weights.expert_scale)
    return with_scores_chosen(inner, x, replace(weights, expert_scale=None), ids, scores)


@slot_mutant
def expert_scale_in_experts(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Weights that the caller gives are scaled too (R9)."""
    if weights.expert_scale is None:
        return experts(inner, x, ids, w, weights)
    own = ids.clamp(0, weights.num_experts - 1).long()
    return experts(inner, x, ids, (w * weights.expert_scale[own]).to(w.dtype), weights)


def _with_scales(
    inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Runs the layer with other scales of the experts if it has any."""
    scale = weights.expert_scale
    return inner(x, logits, replace(weights, expert_scale=None if scale is None else change(scale)))


def _with_sqrtsoftplus(
    inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Runs the layer with other scores of the chosen experts if the scoring is "sqrtsoftplus"."""
    if weights.config.scoring != "sqrtsoftplus":
        return inner(x, logits, weights)
    ids = route(logits, weights.config, weights.selection_bias).topk_ids
    return with_scores_chosen(inner, x, weights, ids, score(logits.double().gather(-1, ids)).double())
