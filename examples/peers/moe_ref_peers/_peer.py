"""What all adapters share: routing is done elsewhere, input is checked and flat, what is not promised is refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from executors import Capabilities, Unsupported
from moe_ref.conformance.declared import refuse_undeclared, refuse_undeclared_slots
from moe_ref.types import MoEWeights
from moe_ref.validation import check_experts_inputs, check_weights

X_OR_FP32 = frozenset({"x", "float32"})
CONCATENATED = frozenset({"concatenated"})
ROWS_OF_16_BYTES = {"align_hidden": 8, "align_intermediate": 8}  # what torch's grouped_mm wants of all strides


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
        refuse_undeclared_slots(self.name, self.capabilities, x, topk_ids, topk_weights, weights)
        rows, ids, slot_weights = (t.reshape(-1, t.shape[-1]) for t in (x, topk_ids.long(), topk_weights))
        return self.compute(rows, ids, slot_weights, weights).to(x.dtype).reshape(x.shape)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what the capabilities leave out."""
        check_weights(weights)
        if not isinstance(x, Tensor):
            raise Unsupported(f"x is a {type(x).__name__}: must be a torch.Tensor")
        refuse_undeclared(self.name, self.capabilities, x, weights)


def plain_swiglu(**changes: Any) -> Capabilities:
    """What most kernels promise: experts with SwiGLU, gate before up, no biases and no clamps, whole tensors."""
    promises: dict[str, Any] = {
        "routing": False,
        "selection": False,
        "activations": frozenset({"swiglu"}),
        "alphas": frozenset({1.0}),
        "limits": frozenset({None}),
        "up_offsets": frozenset({0.0}),
        "gate_up_layouts": CONCATENATED,
        "biases": False,
        "late_clamp": False,
        "softcap": False,
        "scale_input": False,
        "lora": False,
        "topk_weights_dtypes": X_OR_FP32,
        "bias_dtypes": frozenset({"x"}),
        "strided": frozenset(),
    }
    return Capabilities(**promises | changes)


def gpt_oss(**changes: Any) -> Capabilities:
    """The same for gpt-oss: biases, the clamped form with its own constants, and rows of gate and up by turns."""
    constants = {"alphas": frozenset({1.702}), "limits": frozenset({7.0}), "up_offsets": frozenset({1.0})}
    return plain_swiglu(gate_up_layouts=frozenset({"interleaved"}), biases=True, **constants | changes)


def biases_of(layer: MoEWeights) -> dict[str, Tensor]:
    """Both biases, zeros where the layer has none."""
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        own, stack = getattr(layer, f"{name}_bias"), getattr(layer, name)
        found[f"{name}_bias"] = torch.zeros_like(stack[..., 0]) if own is None else own
    return found


def foreign_last(ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Empty slots as transformers marks them: id E and weight 0."""
    foreign = (ids < 0) | (ids >= num_experts)
    return ids.masked_fill(foreign, num_experts), torch.where(foreign, weights.new_zeros(()), weights)
