"""``grouped_nf4``: frozen experts in 4 bits, of which only those with tokens are decoded, once per product.

On a CPU one expert at a time, by bitsandbytes' kernel where that is right. On a GPU in slices of experts, planned on
the device: no host synchronisation where ``grouped_mm`` has none. Weights are frozen; x, the routing, biases and
adapters are differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from executors._decode_kernel import slow_note
from executors._executor import OperatorExecutor
from executors._grouped import check_capture, host_note
from executors._loop import LoopProducts
from executors._multiplication import Multiplication
from executors._operator import Operator, apply, define
from executors._protocol import Capabilities
from executors._sliced import SlicedProducts

if TYPE_CHECKING:
    from torch import Tensor

    from executors._layer import Products
    from moe_ref.types import MoEWeights


def products(group_offsets: Tensor) -> Products:
    """A loop on a CPU, where the offsets are at hand; slices elsewhere."""
    return LoopProducts(group_offsets) if group_offsets.device.type == "cpu" else SlicedProducts(group_offsets)


OPERATOR = define(Multiplication("grouped_nf4", products, on_host=False))


@dataclass(frozen=True)
class GroupedNF4(OperatorExecutor):
    """The executor ``grouped_nf4``.

    Its option is ``recompute``: decode again in backward, which is the default; False keeps what forward decoded, of
    experts that have tokens.

    Example:
        >>> weights = executors.nf4.quantize(weights)
        >>> y = executors.get("grouped_nf4")(x, router_logits, weights)
    """

    recompute: bool = True

    name: ClassVar[str] = "grouped_nf4"
    operator: ClassVar[Operator] = OPERATOR
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        weights=frozenset({"nf4", "fp4", "mxfp4"}),
    )

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for dense weights, other devices and dtypes, and where it would break a capture."""
        super().check(x, weights)
        check_capture(x, weights)

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of a call that works: whether it waits for the GPU, or decodes slowly."""
        return host_note(x, weights) or slow_note(x, weights)

    def _apply(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        keep = not self.recompute
        return apply(self.operator, x, topk_ids, topk_weights, weights, keep_z=True, keep_own=keep)
