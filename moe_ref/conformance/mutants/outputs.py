"""Wrong outputs: of one token, of all tokens, or in the wrong form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import dense_mutant, slot_mutant
from moe_ref.conformance.wrapped import experts
from moe_ref.types import MoEWeights

if TYPE_CHECKING:
    from executors import Executor


@slot_mutant
def zeros(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Returns zeros."""
    return experts(inner, x, ids, w, weights) * 0


@slot_mutant
def one_percent_more(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Output times 1.01 (E2)."""
    return experts(inner, x, ids, w * 1.01, weights)


@slot_mutant
def token_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last token gets zero."""
    mask = torch.ones_like(x[:, :1])
    mask[-1:] = 0
    return experts(inner, x, ids, w, weights) * mask


@slot_mutant
def row_left_unwritten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A token with only empty slots gets uninitialised memory (R7)."""
    y = experts(inner, x, ids, w, weights)
    used = ((ids >= 0) & (ids < weights.num_experts)).any(dim=1, keepdim=True)
    return torch.where(used, y, torch.empty_like(x))


@slot_mutant
def nan_leaks_to_next_token(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A NaN in one token also shows in the next token (R4)."""
    y = experts(inner, x, ids, w, weights)
    return y.masked_fill(y.isnan().any(dim=1, keepdim=True).roll(1, 0), torch.nan)


@slot_mutant
def output_in_fp32(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The output has another dtype than x (T2)."""
    return experts(inner, x, ids, w, weights).to(torch.float32 if x.dtype != torch.float32 else torch.float64)


@slot_mutant
def not_repeatable(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Differs from run to run in the last bit, as a sum by atomics does (C1)."""
    noise = 1 + 2.0**-25 * torch.randn(w.shape, dtype=torch.float64, device=w.device)
    return experts(inner, x, ids, (w * noise).to(w.dtype) if w.dtype != torch.float64 else w * noise, weights)


@dense_mutant
def input_changed_in_place(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Doubles the first expert's second projection after use (E4)."""
    y = experts(inner, x, ids, w, weights)
    weights.down_proj.data[0].mul_(2)
    return y


@slot_mutant
def inference_path_wrong(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Right while gradients are recorded, zeros without."""
    y = experts(inner, x, ids, w, weights)
    return y if torch.is_grad_enabled() else torch.zeros_like(y)


@slot_mutant
def combine_in_x_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Rounds the sum to x's dtype after each slot (C1)."""
    slots = [experts(inner, x, ids[:, k : k + 1], w[:, k : k + 1], weights) for k in range(ids.shape[1])]
    return sum(slots[1:], slots[0])


@slot_mutant
def right_in_deterministic_mode_only(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Adds up by another path, which is wrong, unless torch's deterministic mode is on (E2)."""
    y = experts(inner, x, ids, w, weights)
    return y if torch.are_deterministic_algorithms_enabled() else y * 1.01
