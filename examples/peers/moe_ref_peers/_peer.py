"""What all adapters share: routing is done elsewhere, input is checked and flat, and what is not promised is refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from executors import Capabilities, Unsupported
from moe_ref.types import MoEWeights
from moe_ref.validation import check_experts_inputs, check_weights, dtype_name


@dataclass(frozen=True)
class Peer(ABC):
    """An executor that calls a public implementation.

    A subclass declares what its peer promises, and no more: what the capabilities leave out is refused here, so that a
    clause that fails is a failure of the peer.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the peer promises."""

    @abstractmethod
    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        """y [T, H] of x [T, H], ids int64 [T, K] and weights [T, K]."""

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """Refuses: routing is done elsewhere."""
        raise Unsupported(f"router_logits: must be routed elsewhere; {self.name} has only .experts()")

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer: y, of x's shape and dtype, as the peer computes it.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that the peer does not promise to take.
        """
        check_experts_inputs(x, topk_ids, topk_weights, weights)
        self.check(x, weights)
        flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, topk_ids.long(), topk_weights))
        return self.compute(*flat, weights).to(x.dtype).reshape(x.shape)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what the capabilities leave out."""
        check_weights(weights)
        if not isinstance(x, Tensor):
            raise Unsupported(f"x is a {type(x).__name__}: must be a torch.Tensor")
        able, config = self.capabilities, weights.config
        if able.devices and x.device.type not in able.devices:
            self.refuse("x.device", x.device, sorted(able.devices))
        if dtype_name(x) not in able.dtypes:
            self.refuse("x.dtype", dtype_name(x), sorted(able.dtypes))
        for name, kind in ((name, packed.quant_type) for name, packed in weights.packed().items()):
            if kind not in able.weights:
                self.refuse(f"{name}.quant_type", kind, sorted(able.weights))
        if "dense" not in able.weights and len(weights.packed()) < 2:
            self.refuse("weights", "dense", sorted(able.weights))
        if config.activation not in able.activations:
            self.refuse("activation", config.activation, sorted(able.activations))
        if config.clamp == "after" or config.gate_softcap is not None or config.up_softcap is not None:
            self.refuse("clamp, gate_softcap, up_softcap", "set", ["unset"])
        if config.scale_input or weights.lora is not None or weights.post_expert_norm is not None:
            self.refuse("scale_input, lora, post_expert_norm", "set", ["unset"])

    def refuse(self, name: str, value: object, allowed: list[object]) -> None:
        """Raises Unsupported, naming argument, value, and what is allowed."""
        raise Unsupported(f"{name}={value}: must be {' or '.join(map(str, allowed))} for {self.name}")


def foreign_last(ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Empty slots as transformers marks them: id E and weight 0."""
    foreign = (ids < 0) | (ids >= num_experts)
    return ids.masked_fill(foreign, num_experts), torch.where(foreign, weights.new_zeros(()), weights)
