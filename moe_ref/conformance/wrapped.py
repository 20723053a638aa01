"""Makes mutants and honest variants: changes the inputs or outputs of another executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ref.routing import route
from moe_ref.types import MoEWeights

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
        y = self.experts(rows, topk_ids=given[0], topk_weights=given[1], weights=given[2])
        return y.reshape(x.shape)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """Runs the changed layer with given routing."""
        rows, ids, slot_weights = (value.reshape(-1, value.shape[-1]) for value in (x, topk_ids, topk_weights))
        change = self.slots or experts
        return change(self.inner, rows, ids, slot_weights, weights).reshape(x.shape)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Checks as the inner executor does."""
        self.inner.check(x, weights)


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
