"""What executors have in common: the public calls around what computes the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from executors._base.local import check_local
from executors._base.routing import route, route_checked
from executors._protocol import Capabilities, Unsupported, check_norm
from moe_ref.types import LORA_FACTORS, PROJECTIONS, MoEWeights, PackedTensor, Routing
from moe_ref.validation import check_experts_inputs, check_inputs, check_weights, dtype_name

if TYPE_CHECKING:
    from torch import Tensor

HINTS = dict.fromkeys(("nf4", "fp4", "mxfp4"), "; see grouped_nf4") | {"dense": "; see executors.nf4"}


class LayerExecutor:
    """The public calls of an executor that has ``_apply``, and by default torch's routing."""

    name: ClassVar[str]

    @property
    def capabilities(self) -> Capabilities:
        """What it declares."""
        return Capabilities()

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
        check_local(weights, x=x, router_logits=router_logits)
        self.check(x, weights)
        routing = self._route(router_logits.reshape(-1, weights.num_experts), weights)
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
        check_local(weights, x=x, topk_ids=topk_ids, topk_weights=topk_weights)
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
            Routing with topk_ids [..., K] int64 (T1) and topk_weights [..., K].

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
        """
        return route_checked(router_logits, weights, self._route)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what this executor cannot take."""
        check_weights(weights)
        if not isinstance(x, torch.Tensor):
            raise Unsupported(f"x is a {type(x).__module__}.{type(x).__name__}: must be a torch.Tensor")
        able = self.capabilities
        if able.devices and x.device.type not in able.devices:
            raise Unsupported(f"x.device={x.device}: must be one of {', '.join(sorted(able.devices))} for {self.name}")
        if dtype_name(x) not in able.dtypes:
            raise Unsupported(
                f"x.dtype={dtype_name(x)}: must be one of {', '.join(sorted(able.dtypes))} for {self.name}"
            )
        if not able.lora and any(name in LORA_FACTORS for name in weights.parameters()):
            raise Unsupported(f"lora={type(weights.lora).__name__}: must be None for {self.name}")
        check_norm(self, weights)
        _check_kinds(able, weights, self.name)

    def _route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        """The choice for router_logits [T, E]."""
        return route(router_logits, weights)

    def _apply(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """y, of x's shape, from x [..., H], topk_ids and topk_weights [T, K]."""
        raise NotImplementedError


def _check_kinds(able: Capabilities, weights: MoEWeights, executor: str) -> None:
    """Raises Unsupported for a projection of a kind that is not declared, and for two kinds that are not together."""
    kinds = {name: kind_of(getattr(weights, name)) for name in PROJECTIONS}
    first, second = kinds.values()
    if able.takes(first, second):
        return
    for name, kind in kinds.items():
        beside_dense = able.mixed and first != second and kind == "dense"
        if kind not in able.weights and not beside_dense:
            allowed = " or ".join(sorted(able.weights))
            raise Unsupported(f"{name} is {kind}: must be {allowed} for {executor}{HINTS.get(kind, '')}")
    raise Unsupported(f"down_proj is {second}: must be {first} for {executor}, as gate_up_proj is")


def kind_of(projection: Any) -> str:
    """What a projection is: "dense", "nf4", "fp4" or "mxfp4"."""
    return projection.quant_type if isinstance(projection, PackedTensor) else "dense"
