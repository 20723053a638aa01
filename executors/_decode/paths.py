"""The paths of projections in 4 bits: names and measures that executors share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

Path = Literal["auto", "fused", "decoded", "torch"]


def mean_rows(x: Tensor, weights: MoEWeights) -> float | None:
    """The mean number of rows of an expert, S / E; None where only ``topk_ids`` give K."""
    top_k = weights.config.top_k
    return None if top_k is None else x.numel() // x.shape[-1] * top_k / weights.num_experts
