"""What executors of a custom operator have in common: the public calls around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from executors._operator import Operator, apply
from executors._protocol import Capabilities, Unsupported
from executors._routing import route, route_checked
from moe_ref.types import MoEWeights, NF4Tensor, Routing
from moe_ref.validation import check_experts_inputs, check_inputs, check_weights

if TYPE_CHECKING:
    from torch import Tensor

HINTS = {"nf4": "; see grouped_nf4", "fp4": "; see grouped_nf4", "dense": "; see executors.nf4"}


@dataclass(frozen=True)
class OperatorExecutor:
    """An executor around an operator of `executors._operator`.

    Attributes:
        recompute: keep less for the backward pass, which builds it anew: slower, with the same gradients to the last
            bit (D4). Each executor says what.

    Raises:
        TypeError: ``recompute`` is neither True nor False.
    """

    recompute: bool = False

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    operator: ClassVar[Operator]

    def __post_init__(self) -> None:
        if not isinstance(self.recompute, bool):
            raise TypeError(f"recompute={self.recompute!r}: must be True or False")

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer.

        Args:
            x: [..., H], the dtype of the projections.
            router_logits: [..., E], any float dtype.
            weights: the layer's parameters, of any strides.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that this executor cannot take.
        """
        check_inputs(x, router_logits, weights)
        self.check(x, weights)
        routing = route(router_logits.reshape(-1, weights.num_experts), weights)
        return self._apply(x, routing.topk_ids, routing.topk_weights, weights)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer with routing done elsewhere; ids outside [0, E) are empty slots (R7).

        Args:
            x: [..., H], the dtype of the projections.
            topk_ids: [..., K], int32 or int64.
            topk_weights: [..., K], any float dtype.
            weights: the layer's parameters, of any strides.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that this executor cannot take.
        """
        check_experts_inputs(x, topk_ids, topk_weights, weights)
        self.check(x, weights)
        top_k = topk_ids.shape[-1]
        ids, slot_weights = topk_ids.reshape(-1, top_k), topk_weights.reshape(-1, top_k)
        return self._apply(x, ids, slot_weights, weights)

    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        """The choice that ``__call__`` makes.

        Args:
            router_logits: [..., E], any float dtype.
            weights: the layer's parameters and configuration.

        Returns:
            Routing with topk_ids and topk_weights [..., K].

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
        """
        return route_checked(router_logits, weights)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what this executor cannot take."""
        check_weights(weights)
        if not isinstance(x, torch.Tensor):
            raise Unsupported(f"x is a {type(x).__module__}.{type(x).__name__}: must be a torch.Tensor")
        for name in ("gate_up_proj", "down_proj"):
            kind = kind_of(getattr(weights, name))
            if kind not in self.capabilities.weights:
                allowed = " or ".join(sorted(self.capabilities.weights))
                raise Unsupported(f"{name} is {kind}: must be {allowed} for {self.name}{HINTS.get(kind, '')}")

    def _apply(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """y, of x's shape, from x [..., H], topk_ids and topk_weights [T, K]."""
        return apply(self.operator, x, topk_ids, topk_weights, weights, keep_z=not self.recompute)


def kind_of(projection: Any) -> str:
    """What a projection is: "dense", "nf4" or "fp4"."""
    return projection.quant_type if isinstance(projection, NF4Tensor) else "dense"
