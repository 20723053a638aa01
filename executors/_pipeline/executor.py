"""Executors around an operator of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from executors._base.executor import OperatorExecutor
from executors._pipeline import cpu_product

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights


@dataclass(frozen=True)
class PipelineExecutor(OperatorExecutor):
    """An `OperatorExecutor` that tells which products a call takes."""

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of a call that works: on a CPU, which products it takes."""
        return cpu_product.note(x)
