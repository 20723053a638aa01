"""Choosing experts in torch, for every executor that routes (clauses R1 to R6).

No host synchronisation, no data-dependent shape. The choice is a custom operator, so that an activation checkpoint can
keep its ids (`executors.checkpoint_policy`, D5); the weights are plain torch, differentiable by autograd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from executors._base.local import check_local
from moe_ref.types import MoEConfig, MoEWeights, Routing
from moe_ref.validation import check_router_logits, dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def route_checked(
    router_logits: Tensor, weights: MoEWeights, choice: Callable[[Tensor, MoEWeights], Routing] | None = None
) -> Routing:
    """`route`, or another ``choice``, with validation, for any leading dimensions: an executor's own ``route``.

    Ids are int64, whatever the choice makes (T1).
    """
    check_router_logits(router_logits, weights)
    check_local(weights, router_logits=router_logits)
    routing = (choice or route)(router_logits.reshape(-1, weights.num_experts), weights)
    shape = (*router_logits.shape[:-1], routing.topk_ids.shape[-1])
    return Routing(routing.topk_ids.reshape(shape).long(), routing.topk_weights.reshape(shape))


def route(router_logits: Tensor, weights: MoEWeights) -> Routing:
    """Chooses K experts for each token and weighs them.

    Scores are computed in the widest of the projections' dtype, the logits' dtype and fp32.

    Args:
        router_logits: [T, E], any float dtype, read exactly.
        weights: the layer's parameters and configuration; ``config.top_k`` must be set.

    Returns:
        Routing with topk_ids [T, K] int64, ordered by (key descending, id ascending), and topk_weights [T, K].
    """
    config, bias = weights.config, weights.selection_bias
    assert config.top_k is not None
    groups = config.num_groups, config.topk_groups, config.group_score
    bias = None if bias is None else bias.detach()
    ids = choose(router_logits.detach(), bias, config.top_k, config.scoring, *groups, config.selection_key)
    return weigh(router_logits, ids, weights)


def weigh(router_logits: Tensor, ids: Tensor, weights: MoEWeights) -> Routing:
    """The weights of chosen experts, in operators of torch (R4, R5, R6, R9).

    Args:
        router_logits: [T, E], any float dtype, read exactly.
        ids: [T, K] int64.
        weights: the layer's parameters and configuration.

    Returns:
        Routing with these ids and topk_weights [T, K].
    """
    config = weights.config
    of_x = getattr(torch, dtype_name(weights.gate_up_proj))
    wide = torch.promote_types(torch.promote_types(of_x, router_logits.dtype), torch.float32)
    logits = router_logits.to(wide)
    broken = _broken_rows(logits.detach(), config)
    chosen = _chosen_scores(logits.masked_fill(broken, 0.0), ids, config)
    if config.renormalize:
        chosen = chosen / _divisor(chosen.sum(dim=-1, keepdim=True), config)
    routing = Routing(ids, (chosen * config.routed_scaling_factor).masked_fill(broken, math.nan))
    return scaled_by_expert(routing, weights.expert_scale)


def _divisor(total: Tensor, config: MoEConfig) -> Tensor:
    """What renormalisation divides by; where that is 0, which only an epsilon of 0 allows, 1 (R5)."""
    eps = config.renormalize_eps
    total = total.clamp(min=eps) if config.renormalize_form == "max" else total + eps
    return total if eps >= torch.finfo(total.dtype).tiny else total.masked_fill(total.detach() == 0.0, 1.0)


def scaled_by_expert(routing: Routing, expert_scale: Tensor | None) -> Routing:
    """The weights times the learned scales of their experts, if there are any (R9).

    An undefined row stays NaN, and is none of the scales' gradient: a token that is masked afterwards adds 0 (R7).
    """
    if expert_scale is None:
        return routing
    undefined = routing.topk_weights.detach().isnan()
    # Gathered from a row for each token: the backward pass of an index adds with atomics on a CPU, this one never (C1).
    rows = expert_scale.to(routing.topk_weights.dtype).expand(routing.topk_ids.shape[0], -1)
    scaled = routing.topk_weights.masked_fill(undefined, 0.0) * rows.gather(-1, routing.topk_ids.long())
    return Routing(routing.topk_ids, scaled.masked_fill(undefined, math.nan))


@torch.library.custom_op("moe_ref::choose", mutates_args=())
def choose(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    selection_key: str,
) -> Tensor:
    """Ids [T, K] int64 of the experts chosen for router_logits [T, E] (R2, R3, R4)."""
    if selection_bias is None and num_groups == 1:  # every scoring orders as the logits do: exact in any dtype
        return _largest(router_logits, top_k)
    scores = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    impossible = scores.isnan() | (scores == -math.inf)
    if selection_key == "score" and scoring != "topk_softmax":
        scores = scores.softmax(dim=-1) if scoring == "softmax" else _score(scores, scoring)
    keys = scores if selection_bias is None else scores + selection_bias.to(scores.dtype)
    keys = keys.masked_fill(impossible | keys.isnan(), -math.inf)
    if num_groups > 1:
        members = keys.view(*keys.shape[:-1], num_groups, keys.shape[-1] // num_groups)
        best = members.sort(dim=-1, descending=True).values
        of_groups = best[..., 0]
        if group_score != "max":
            of_groups = of_groups + best[..., 1]
            of_groups = of_groups.masked_fill(of_groups.isnan(), -math.inf)  # inf - inf, by a bias (R2)
        kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter(-1, _largest(of_groups, topk_groups), True)
        keys = members.masked_fill(~kept[..., None], -math.inf).flatten(-2)
    return _largest(keys, top_k)


@choose.register_fake
def _(router_logits: Tensor, selection_bias: Tensor | None, top_k: int, *_choice: Any) -> Tensor:
    return router_logits.new_empty((*router_logits.shape[:-1], top_k), dtype=torch.int64)


@choose.register_vmap
def _(info: Any, dims: Any, router_logits: Tensor, selection_bias: Tensor | None, *choice: Any) -> tuple[Tensor, int]:
    of_logits, of_bias = dims[:2]
    logits = router_logits.expand(info.batch_size, *router_logits.shape)
    if of_logits is not None:
        logits = router_logits.movedim(of_logits, 0)
    if of_bias is not None and selection_bias is not None:
        bias = selection_bias.movedim(of_bias, 0)
        selection_bias = bias.reshape(bias.shape[0], *[1] * (logits.ndim - bias.ndim), *bias.shape[1:])
    return choose(logits, selection_bias, *choice), 0


def _largest(keys: Tensor, count: int) -> Tensor:
    """Places of the largest keys, the lower place of equals first."""
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def _broken_rows(logits: Tensor, config: MoEConfig) -> Tensor:
    """[T, 1]: rows whose weights are undefined, which must stay NaN and harm no other row (R4)."""
    broken = logits.isnan().any(dim=-1, keepdim=True)
    if config.scoring == "sigmoid":
        return broken
    broken = broken | (logits == math.inf).any(dim=-1, keepdim=True)
    return broken if config.scoring == "sqrtsoftplus" else broken | (logits == -math.inf).all(dim=-1, keepdim=True)


def _chosen_scores(logits: Tensor, ids: Tensor, config: MoEConfig) -> Tensor:
    if config.scoring == "softmax":
        return logits.softmax(dim=-1).gather(-1, ids)
    chosen = logits.gather(-1, ids)
    return chosen.softmax(dim=-1) if config.scoring == "topk_softmax" else _score(chosen, config.scoring)


def _score(logits: Tensor, scoring: str) -> Tensor:
    """The score of each logit alone: its sigmoid, or sqrt(log(1 + exp(logit))).

    That square root is exp(logit / 2) far below 0, where softplus underflows and the derivative of sqrt is infinite: at
    -inf a gradient of 0 must not become NaN. The bounds are fp64's; torch's own, 20, is fp32's.
    """
    if scoring == "sigmoid":
        return logits.sigmoid()
    far = logits < -40.0
    near = torch.nn.functional.softplus(logits.masked_fill(far, 0.0), threshold=40.0).sqrt()
    return torch.where(far, logits.masked_fill(~far, 0.0).mul(0.5).exp(), near)
