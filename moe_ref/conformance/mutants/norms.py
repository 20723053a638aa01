"""The norm of each expert's output mistaken, forward and backward (E8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.honest import loop, normalized
from moe_ref.conformance.mutants._registry import slot_mutant
from moe_ref.conformance.mutants.gradients import change_gradient
from moe_ref.conformance.wrapped import configured, experts
from moe_ref.types import MoEWeights

if TYPE_CHECKING:
    from executors import Executor

NormChange = Callable[[Tensor, Tensor, float], Tensor]


@slot_mutant
def norm_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The experts' outputs are not normalised (E8)."""
    return experts(inner, x, ids, w, replace(weights, post_expert_norm=None))


@slot_mutant
def norm_after_weight(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The weighted outputs are normalised, so that the weight cancels (E8)."""
    if weights.post_expert_norm is None or weights.config.scale_input:
        return experts(inner, x, ids, w, weights)
    return experts(inner, x, ids, torch.where(w == 0, w, w / w.detach()), weights)


@slot_mutant
def norm_after_sum(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The sum over a token's slots is normalised, and not each of them (E8)."""
    gamma = weights.post_expert_norm
    y = experts(inner, x, ids, w, replace(weights, post_expert_norm=None))
    if gamma is None:
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    return normalized(y.to(wide), gamma.to(wide), weights.config.post_expert_norm_eps).to(x.dtype)


@slot_mutant
def norm_without_epsilon(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Nothing is added to the mean square (E8)."""
    return experts(inner, x, ids, w, configured(weights, post_expert_norm_eps=2.0**-126))


@slot_mutant
def norm_with_epsilon_after_root(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The epsilon is added to the root of the mean square (E8)."""

    def wrong(o: Tensor, gamma: Tensor, eps: float) -> Tensor:
        n = gamma * o
        return n / (n.square().mean(dim=1, keepdim=True).sqrt() + eps)

    return _with_norm(inner, x, ids, w, weights, wrong)


@slot_mutant
def norm_of_sum_for_mean(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The squares are summed, and no mean is taken (E8)."""

    def wrong(o: Tensor, gamma: Tensor, eps: float) -> Tensor:
        n = gamma * o
        return n / (n.square().sum(dim=1, keepdim=True) + eps).sqrt()

    return _with_norm(inner, x, ids, w, weights, wrong)


@slot_mutant
def norm_over_rows(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The mean is taken over an expert's rows, and not over the features (E8)."""
    return _with_norm(inner, x, ids, w, weights, lambda o, gamma, eps: normalized((gamma * o).t(), _one(o), eps).t())


@slot_mutant
def norm_factor_after_norm(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The factor multiplies what is normalised already, as in most norms (E8)."""
    return _with_norm(inner, x, ids, w, weights, lambda o, gamma, eps: gamma * normalized(o, _one(o), eps))


@slot_mutant
def norm_factor_less_one(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The factor is taken for what models store, 1 less (E8)."""
    return _with_factor(inner, x, ids, w, weights, lambda gamma: gamma - 1)


@slot_mutant
def norm_in_bf16(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The mean square is computed in bf16 (E8)."""

    def wrong(o: Tensor, gamma: Tensor, eps: float) -> Tensor:
        n = gamma * o
        return n / (n.bfloat16().square().mean(dim=1, keepdim=True).to(n.dtype) + eps).sqrt()

    return _with_norm(inner, x, ids, w, weights, wrong)


@slot_mutant
def norm_with_size_held(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient takes the root of the mean square for a constant: do = gamma r do' (E8, D1)."""

    def wrong(o: Tensor, gamma: Tensor, eps: float) -> Tensor:
        n = gamma * o
        return n / (n.detach().square().mean(dim=1, keepdim=True) + eps).sqrt()

    return _with_norm(inner, x, ids, w, weights, wrong)


@slot_mutant
def norm_passed_back(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient of o is that of o', as if there were no norm (E8, D1)."""

    def wrong(o: Tensor, gamma: Tensor, eps: float) -> Tensor:
        return normalized(o.detach(), gamma, eps) + (o - o.detach())

    return _with_norm(inner, x, ids, w, weights, wrong)


@slot_mutant
def norm_factor_with_twice_its_gradient(
    inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights
) -> Tensor:
    """The output is right, and the gradient of the factor twice what it is (E8, D1)."""
    return _with_factor(inner, x, ids, w, weights, lambda gamma: change_gradient(gamma, lambda gradient: 2 * gradient))


@slot_mutant
def norm_factor_without_gradient(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The factor is held constant (E8, D1)."""
    return _with_factor(inner, x, ids, w, weights, lambda gamma: change_gradient(gamma, torch.zeros_like))


@slot_mutant
def norm_missing_in_d3(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """D topk_weights is <dy, o>, the output before the norm (E8, D3)."""
    if weights.post_expert_norm is None or weights.config.scale_input:
        return experts(inner, x, ids, w, weights)
    y = experts(inner, x, ids, w.detach(), weights)
    held = replace(weights.map(Tensor.detach), post_expert_norm=None)
    o = experts(inner, x.detach(), ids, w, held)
    return y + (o - o.detach())


def _with_norm(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, norm: NormChange) -> Tensor:
    """Runs a plain loop with another norm if the layer has one."""
    if weights.post_expert_norm is None:
        return experts(inner, x, ids, w, weights)
    return loop(x, ids, w, weights, norm=norm)


def _with_factor(
    inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Runs the layer with another factor if it has one."""
    gamma = weights.post_expert_norm
    return experts(inner, x, ids, w, replace(weights, post_expert_norm=None if gamma is None else change(gamma)))


def _one(o: Tensor) -> Tensor:
    return torch.ones((), dtype=o.dtype, device=o.device)
