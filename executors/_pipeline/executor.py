"""Executors around an operator of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from executors._base.executor import LayerExecutor
from executors._base.operator import Operator, apply
from executors._pipeline import cpu_product
from executors._protocol import Capabilities

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights


@dataclass(frozen=True)
class PipelineExecutor(LayerExecutor):
    """An executor of dense stacks around an operator of `executors._base.operator`.

    Attributes:
        recompute: keep less for the backward pass, which builds it anew: slower, with the same gradients to the last
            bit (D4). Each executor says what.

    Raises:
        TypeError: ``recompute`` is neither True nor False.
    """

    recompute: bool = False

    capabilities: ClassVar[Capabilities] = Capabilities(post_expert_norm=True)
    operator: ClassVar[Operator]

    def __post_init__(self) -> None:
        if not isinstance(self.recompute, bool):
            raise TypeError(f"recompute={self.recompute!r}: must be True or False")

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of a call that works: on a CPU, which products it takes."""
        return cpu_product.note(x)

    def _apply(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        return apply(self.operator, x, topk_ids, topk_weights, weights, keep_z=not self.recompute)
