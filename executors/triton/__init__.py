"""``triton``: routing, grouping, both products and the sum over slots in Triton kernels. bf16, fp16, fp32.

Nothing waits for the GPU and no shape depends on data, so a call can be captured in a CUDA graph. Sums are in fp32, in
a fixed order, without atomics: bitwise repeatable. Rows are gathered as they are read, biases, activation and weights
are applied as results are written. This version has no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from executors._executor import LayerExecutor
from executors._protocol import Capabilities, Unavailable, Unsupported
from executors.triton import _grouping, _operator, _routing
from executors.triton._device import INTERPRETED

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights, Routing


@dataclass(frozen=True)
class Triton(LayerExecutor):
    """The executor ``triton``.

    Attributes:
        batch_invariant: one configuration of the kernels for any number of rows, so that a token's output never
            depends on other tokens, to the last bit (C2): slower for few rows per expert.

    Raises:
        TypeError: ``batch_invariant`` is neither True nor False.
        Unavailable: there is no GPU, and Triton's interpreter is off.

    Example:
        >>> y = executors.get("triton")(x, router_logits, weights)
    """

    batch_invariant: bool = False

    name: ClassVar[str] = "triton"

    def __post_init__(self) -> None:
        if not isinstance(self.batch_invariant, bool):
            raise TypeError(f"batch_invariant={self.batch_invariant!r}: must be True or False")
        if not INTERPRETED and not torch.cuda.is_available():
            raise Unavailable(
                "executor 'triton' needs a GPU; TRITON_INTERPRET=1 checks its numbers without one, slowly"
            )

    @property
    def capabilities(self) -> Capabilities:
        """What it declares; a CPU only under the interpreter."""
        return Capabilities(
            devices=frozenset({"cpu", "cuda"} if INTERPRETED else {"cuda"}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            backward=False,
            lora=False,
            batch_invariant=self.batch_invariant,
            interpreted=INTERPRETED,
        )

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what this executor cannot take."""
        super().check(x, weights)
        self._check_slots(x.numel() // x.shape[-1] * (weights.config.top_k or 1))

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of a call that works: that it is interpreted."""
        return "interpreted on the CPU (TRITON_INTERPRET=1): slow, for numbers only" if INTERPRETED else ""

    def _check_slots(self, slots: int) -> None:
        if slots > _grouping.MOST_SLOTS:
            raise Unsupported(f"T*K={slots} slots: must be at most {_grouping.MOST_SLOTS} for {self.name}")

    def _route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        return _routing.route(router_logits, weights)

    def _apply(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        config = weights.config
        self._check_slots(topk_ids.numel())
        y = _operator.operator(
            x.reshape(-1, x.shape[-1]),
            topk_ids,
            topk_weights,
            weights.gate_up_proj,
            weights.down_proj,
            weights.gate_up_proj_bias,
            weights.down_proj_bias,
            config.scale_input,
            config.activation,
            float(config.alpha),
            None if config.limit is None else float(config.limit),
            float(config.up_offset),
            config.gate_up_layout,
            self.batch_invariant,
        )
        return y.reshape(x.shape)
