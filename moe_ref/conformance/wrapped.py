"""Makes mutants and honest variants: changes the inputs or outputs of another executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ref.conformance.declared import refuse_undeclared, refuse_undeclared_routing, refuse_undeclared_slots
from moe_ref.routing import route
from moe_ref.types import MoEWeights
from moe_ref.validation import check_experts_inputs, check_inputs, check_weights, dtype_name

if TYPE_CHECKING:
    from executors import Capabilities, Executor

SlotChange = Callable[["Executor", Tensor, Tensor, Tensor, MoEWeights], Tensor]
LayerChange = Callable[["Executor", Tensor, Tensor, MoEWeights], Tensor]


@dataclass(frozen=True)
class Wrapped:
    """An executor made from another one. It routes by the specification and offers no ``route``."""

    name: str
    inner: Executor
    slots: SlotChange | None = None
    layer: LayerChange | None = None

    @property
    def capabilities(self) -> Capabilities:
        """The inner executor's capabilities."""
        return self.inner.capabilities

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """Runs the changed layer on flat tokens."""
        rows, logits = x.reshape(-1, x.shape[-1]), router_logits.reshape(-1, weights.num_experts)
        if self.layer is not None:
            return self.layer(self.inner, rows, logits, weights).reshape(x.shape)
        routing = route(logits, weights.config, weights.selection_bias, expert_scale=weights.expert_scale)
        given = routing.topk_ids, narrow(routing.topk_weights, x), replace(weights, expert_scale=None)
        return self._changed(rows, *given).reshape(x.shape)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """Runs the changed layer with given routing."""
        rows, ids, slot_weights = (value.reshape(-1, value.shape[-1]) for value in (x, topk_ids, topk_weights))
        return self._changed(rows, ids, slot_weights, weights).reshape(x.shape)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Checks as the inner executor does."""
        self.inner.check(x, weights)

    def _changed(self, x: Tensor, ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        return (self.slots or experts)(self.inner, x, ids, topk_weights, weights)


def _everything() -> Capabilities:
    from executors import Capabilities

    return Capabilities()


@dataclass(frozen=True)
class Declaring(Wrapped):
    """An executor that declares less than its inner one, and raises Unsupported for all the rest."""

    declared: Capabilities = field(default_factory=_everything)

    @property
    def capabilities(self) -> Capabilities:
        """What it declares."""
        return self.declared

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """Runs the changed layer on what is declared."""
        check_inputs(x, router_logits, weights)
        self.check(x, weights)
        refuse_undeclared_routing(self.name, self.declared, dtype_name(x), router_logits, weights)
        return super().__call__(x, router_logits, weights)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """Runs the changed layer with given routing, on what is declared."""
        check_experts_inputs(x, topk_ids, topk_weights, weights)
        self.check(x, weights)
        refuse_undeclared_slots(self.name, self.declared, x, topk_ids, topk_weights, weights)
        return super().experts(x, topk_ids=topk_ids, topk_weights=topk_weights, weights=weights)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what is not declared."""
        check_weights(weights)
        refuse_undeclared(self.name, self.declared, x, weights)
        super().check(x, weights)


def experts(inner: Executor, x: Tensor, ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
    """Runs the inner executor, unchanged."""
    return inner.experts(x, topk_ids=ids, topk_weights=topk_weights, weights=weights)


def slot_by_slot(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> list[Tensor]:
    """Runs the inner executor once for each of the K slots; returns K results [T, H], in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return [experts(inner, x, ids[:, k : k + 1], w[:, k : k + 1], weights).to(wide) for k in range(ids.shape[1])]


def narrow(topk_weights: Tensor, x: Tensor) -> Tensor:
    """Rounds the specification's weights to the dtype that an executor would give them."""
    return topk_weights.to(torch.promote_types(x.dtype, torch.float32))


def configured(weights: MoEWeights, **changes: Any) -> MoEWeights:
    """The layer with a changed configuration."""
    return replace(weights, config=replace(weights.config, **changes))


def column_mask(value: Tensor) -> Tensor:
    """Ones, with a zero in the last column."""
    mask = torch.ones_like(value)
    mask[..., -1:] = 0
    return mask
