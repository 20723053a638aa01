"""``native``: plain torch, one product per expert that has tokens. Any device, any dtype of T1.

One stable sort, one host synchronisation per forward (the group offsets), none in backward; no atomics, so bitwise
repeatable. For backward it keeps z, [S, 2I], and nothing else that grows with S*H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from executors import _native_op
from executors._protocol import Capabilities, Unsupported
from executors._routing import route, route_checked
from moe_ref.types import MoEWeights, Routing
from moe_ref.validation import check_experts_inputs, check_inputs, check_weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Native:
    """The executor ``native``. It has no options.

    Example:
        >>> y = executors.get("native")(x, router_logits, weights)
    """

    name: ClassVar[str] = "native"
    capabilities: ClassVar[Capabilities] = Capabilities()

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer.

        Args:
            x: [..., H], the dtype of the dense projections.
            router_logits: [..., E], any float dtype.
            weights: the layer's parameters, of any strides.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
        """
        check_inputs(x, router_logits, weights)
        self.check(x, weights)
        routing = route(router_logits.reshape(-1, weights.num_experts), weights.config, x.dtype)
        return _apply(x, routing.topk_ids, routing.topk_weights, weights)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer with routing done elsewhere; ids outside [0, E) are empty slots (R7).

        Args:
            x: [..., H], the dtype of the dense projections.
            topk_ids: [..., K], int32 or int64.
            topk_weights: [..., K], any float dtype.
            weights: the layer's parameters, of any strides.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
        """
        check_experts_inputs(x, topk_ids, topk_weights, weights)
        self.check(x, weights)
        top_k = topk_ids.shape[-1]
        return _apply(x, topk_ids.reshape(-1, top_k), topk_weights.reshape(-1, top_k), weights)

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
        """Raises Unsupported for what this executor cannot take: arrays of another library."""
        check_weights(weights)
        if not isinstance(x, torch.Tensor):
            raise Unsupported(f"x is a {type(x).__module__}.{type(x).__name__}: must be a torch.Tensor")


def _apply(x: Tensor, ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
    config = weights.config
    rows = x.reshape(-1, x.shape[-1])
    tensors = (
        topk_weights,
        weights.gate_up_proj,
        weights.down_proj,
        weights.gate_up_proj_bias,
        weights.down_proj_bias,
    )
    needs_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, *tensors))
    outputs = _native_op.forward(
        rows, ids, *tensors, needs_z, config.alpha, config.limit, config.up_offset, config.gate_up_layout
    )
    return outputs[0].reshape(x.shape)
