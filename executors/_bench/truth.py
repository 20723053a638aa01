"""The exact answer for a few tokens of a large layer, with error bars.

`moe_ref.error_bars` samples it in float64, one expert widened at a time. Only what is judged is computed: the outputs
and gradients of the tokens themselves, and a few rows of the gradients of each projection and adapter, for the experts
that these tokens chose. dy is zero for all other tokens, so they add nothing. The specification decodes projections in
4 bits: what they lost when they were quantised does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from executors._bench.layers import BenchLayer, Shape
from executors._bench.routing import Batch
from moe_ref.error_bars import TensorBars, error_bars
from moe_ref.packed import decode_expert
from moe_ref.types import MoEWeights, PackedTensor

SAMPLES = 32
ROWS = 8  # judged of the gradient of each projection and each factor, for each expert
MOST_JUDGED = 4
DEAR = 5_000_000  # K * H * I from which only half as many tokens are judged


@dataclass(frozen=True, eq=False)
class SampledTruth:
    """Exact values with error bars.

    Attributes:
        bars: by tensor; those of the parameters' gradients are [A, ...] with the rows of ``rows``.
        active: [A] experts that the judged tokens chose, ascending.
        rows: for each matrix that is trained, the rows that are judged.
    """

    bars: dict[str, TensorBars]
    active: Tensor
    rows: dict[str, Tensor]


def judged_tokens(shape: Shape) -> int:
    """How many tokens are judged."""
    dear = shape.top_k * shape.hidden * shape.intermediate > DEAR
    return MOST_JUDGED // 2 if dear else MOST_JUDGED


def sample_truth(layer: BenchLayer, batch: Batch, backward: bool, seed: int) -> SampledTruth:
    """Computes the exact answer for the batch's judged tokens, and samples its error bars.

    Args:
        layer: the layer.
        batch: the input.
        backward: whether gradients are wanted.
        seed: of the samples.
    """
    where = batch.judged
    ids = batch.topk_ids[where].cpu()
    active, local = torch.unique(ids, return_inverse=True)
    x, dy, slot_weights = (t.detach()[where].double().cpu() for t in (batch.x, batch.dy, batch.topk_weights))
    weights = _only(layer.weights(), active)
    rows = {
        name: torch.linspace(0, value.shape[1] - 1, min(ROWS, value.shape[1])).round().long()
        for name, value in weights.parameters().items()
        if value.ndim == 3
    }
    bars = error_bars(
        x,
        local,
        weights,
        dy if backward else None,
        topk_weights=slot_weights,
        dtype="bfloat16",
        samples=SAMPLES,
        seed=seed,
        rows_of=rows,
    )
    wanted = {"y", *batch.leaves(), *layer.parameters}
    return SampledTruth({name: found for name, found in bars.items() if name in wanted}, active, rows)


def _only(weights: MoEWeights, active: Tensor) -> MoEWeights:
    """The active experts' parameters, on the CPU; numbers in 4 bits decoded, into the dtype that they decode to."""

    def chosen(stack: Tensor | PackedTensor) -> Tensor:
        if isinstance(stack, PackedTensor):
            matrices = torch.stack([decode_expert(stack, int(index)) for index in active])
            return matrices.to(getattr(torch, stack.dtype)).cpu()
        return stack.detach()[active.to(stack.device)].cpu()

    stacks = weights.parameters() | weights.packed()
    return weights.with_parameters({name: chosen(stack) for name, stack in stacks.items()})
