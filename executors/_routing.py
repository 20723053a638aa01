"""Choosing experts in torch, for every executor that routes (clauses R1, R2, R4, R5, R6).

No host synchronisation, no data-dependent shape: traceable, and differentiable by autograd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moe_ref.types import MoEConfig, MoEWeights, Routing
from moe_ref.validation import check_router_logits

if TYPE_CHECKING:
    from torch import Tensor


def route_checked(router_logits: Tensor, weights: MoEWeights) -> Routing:
    """`route` with validation, for any leading dimensions: what an executor offers as its ``route``."""
    check_router_logits(router_logits, weights)
    flat = router_logits.reshape(-1, weights.num_experts)
    routing = route(flat, weights.config, weights.gate_up_proj.dtype)
    shape = (*router_logits.shape[:-1], routing.topk_ids.shape[-1])
    return Routing(routing.topk_ids.reshape(shape), routing.topk_weights.reshape(shape))


def route(router_logits: Tensor, config: MoEConfig, dtype: torch.dtype) -> Routing:
    """Chooses K experts for each token and weighs them.

    Args:
        router_logits: [T, E], any float dtype, read exactly.
        config: ``top_k`` must be set.
        dtype: x's dtype; scores are computed in the widest of it, the logits' dtype and fp32.

    Returns:
        Routing with topk_ids [T, K] int64, ordered by (logit descending, id ascending), and topk_weights [T, K].
    """
    assert config.top_k is not None
    ids = torch.sort(router_logits.detach(), dim=-1, descending=True, stable=True).indices[:, : config.top_k]
    wide = torch.promote_types(torch.promote_types(dtype, router_logits.dtype), torch.float32)
    logits = router_logits.to(wide)
    broken = _broken_rows(logits.detach(), config)
    weights = _chosen_scores(logits.masked_fill(broken, 0.0), ids, config)
    if config.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + config.renormalize_eps)
    return Routing(ids, (weights * config.routed_scaling_factor).masked_fill(broken, math.nan))


def _broken_rows(logits: Tensor, config: MoEConfig) -> Tensor:
    """[T, 1]: rows whose weights are undefined, which must stay NaN and harm no other row (R4)."""
    broken = logits.isnan().any(dim=-1, keepdim=True)
    if config.scoring == "sigmoid":
        return broken
    positive = (logits == math.inf).any(dim=-1, keepdim=True)
    return broken | positive | (logits == -math.inf).all(dim=-1, keepdim=True)


def _chosen_scores(logits: Tensor, ids: Tensor, config: MoEConfig) -> Tensor:
    if config.scoring == "softmax":
        return logits.softmax(dim=-1).gather(-1, ids)
    chosen = logits.gather(-1, ids)
    return chosen.softmax(dim=-1) if config.scoring == "topk_softmax" else chosen.sigmoid()
