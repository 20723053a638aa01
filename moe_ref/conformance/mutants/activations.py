"""Forms of swiglu mistaken: the clamp's place, and softcaps (E1)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ref.conformance.honest import activated, capped, halves, loop
from moe_ref.conformance.mutants._registry import slot_mutant
from moe_ref.conformance.wrapped import configured, experts
from moe_ref.types import MoEConfig, MoEWeights

if TYPE_CHECKING:
    from executors import Executor

APART: dict[str, Any] = {"gate_up_layout": "concatenated"}  # of halves that were joined again


class _GradientOf(torch.autograd.Function):
    """The first value forward; the gradient of the second backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _with_gradient_of(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, **other: Any) -> Tensor:
    """The right layer, with the gradients of another configuration's."""
    with torch.no_grad():
        y = experts(inner, x, ids, w, weights)
    return _GradientOf.apply(y, experts(inner, x, ids, w, configured(weights, **other)))  # type: ignore[no-untyped-call]


@slot_mutant
def late_clamp_before_activation(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """What comes after the activation is clamped before it instead (E1)."""
    return experts(inner, x, ids, w, configured(weights, clamp="before"))


@slot_mutant
def late_clamp_on_product(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The late clamp bounds h, and not act(g) (E1)."""

    def wrong(z: Tensor, config: MoEConfig) -> Tensor:
        if config.clamp == "before":
            return activated(z, config)
        return activated(z, replace(config, limit=None, clamp="before")).clamp(max=config.limit)

    return loop(x, ids, w, weights, wrong)


@slot_mutant
def late_clamp_without_slope(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient passes through the clamp of act(g) as if nothing were clamped (E1, D1)."""
    if weights.config.clamp == "before":
        return experts(inner, x, ids, w, weights)
    return _with_gradient_of(inner, x, ids, w, weights, limit=None, clamp="before")


@slot_mutant
def gate_softcap_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gate is not capped (E1)."""
    return experts(inner, x, ids, w, configured(weights, gate_softcap=None))


@slot_mutant
def up_softcap_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The up half is not capped (E1)."""
    return experts(inner, x, ids, w, configured(weights, up_softcap=None))


@slot_mutant
def softcaps_swapped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gate has the cap of the up half, and the up half that of the gate (E1)."""
    own = weights.config
    return experts(inner, x, ids, w, configured(weights, gate_softcap=own.up_softcap, up_softcap=own.gate_softcap))


@slot_mutant
def sigmoid_of_capped_gate(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The sigmoid sees the capped gate (E1)."""

    def wrong(z: Tensor, config: MoEConfig) -> Tensor:
        cap = config.gate_softcap
        if cap is None:
            return activated(z, config)
        gate, up = halves(z, config)
        return activated(torch.cat([capped(gate, cap), up], dim=1), replace(config, **APART, gate_softcap=None))

    return loop(x, ids, w, weights, wrong)


@slot_mutant
def offset_capped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The offset is added to the up half before its cap (E1)."""

    def wrong(z: Tensor, config: MoEConfig) -> Tensor:
        if config.up_softcap is None:
            return activated(z, config)
        gate, up = halves(z, config)
        return activated(torch.cat([gate, up + config.up_offset], dim=1), replace(config, **APART, up_offset=0.0))

    return loop(x, ids, w, weights, wrong)


@slot_mutant
def softcaps_without_slope(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient passes through both caps as if they were the identity (E1, D1)."""
    if weights.config.gate_softcap is None and weights.config.up_softcap is None:
        return experts(inner, x, ids, w, weights)
    return _with_gradient_of(inner, x, ids, w, weights, gate_softcap=None, up_softcap=None)
