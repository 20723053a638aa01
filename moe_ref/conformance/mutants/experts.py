"""Experts that compute something else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import dense_mutant, slot_mutant
from moe_ref.conformance.wrapped import column_mask, configured, experts, slot_by_slot
from moe_ref.types import MoEWeights

if TYPE_CHECKING:
    from executors import Executor


@slot_mutant
def hidden_tail_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last column of x is masked away in the up projection (E3)."""
    return experts(inner, x * column_mask(x), ids, w, weights)


@dense_mutant
def intermediate_tail_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last column of h is masked away in the down projection (E3)."""
    mask = column_mask(weights.down_proj)
    return experts(inner, x, ids, w, replace(weights, down_proj=weights.down_proj * mask))


@dense_mutant
def gate_and_up_swapped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Gate is taken for up and up for gate (E1)."""
    both = weights.gate_up_proj.shape[1]
    if not weights.config.gated:
        return experts(inner, x, ids, w, weights)
    rows = torch.arange(both).view(-1, 2).flip(1) if _interleaved(weights) else torch.arange(both).view(2, -1).flip(0)
    rows = rows.reshape(-1).to(x.device)
    names = ("gate_up_proj", "gate_up_proj_bias", "gate_up_lora_b")
    swapped = weights.with_parameters({n: v[:, rows] for n, v in weights.parameters().items() if n in names})
    return experts(inner, x, ids, w, swapped)


@slot_mutant
def layout_mistaken(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Concatenated is read as interleaved, or the other way round (E1)."""
    layout = "interleaved" if weights.config.gated and not _interleaved(weights) else "concatenated"
    return experts(inner, x, ids, w, configured(weights, gate_up_layout=layout))


@slot_mutant
def gelu_for_silu(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """X sigmoid(1.702 x), an approximation of gelu, replaces silu, or silu replaces it (E1)."""
    if weights.config.activation != "swiglu":
        return experts(inner, x, ids, w, weights)
    return experts(inner, x, ids, w, configured(weights, alpha=1.0 if weights.config.alpha != 1.0 else 1.702))


@slot_mutant
def clamp_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The clamp is left out (E1)."""
    return experts(inner, x, ids, w, configured(weights, limit=None, clamp="before"))


@slot_mutant
def up_offset_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The offset of the up half is left out (E1)."""
    return experts(inner, x, ids, w, configured(weights, up_offset=0.0))


@slot_mutant
def gate_up_bias_twice(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The first bias is added twice (E1)."""
    bias = weights.gate_up_proj_bias
    return experts(inner, x, ids, w, replace(weights, gate_up_proj_bias=None if bias is None else 2 * bias))


@dense_mutant
def gate_up_bias_after_activation(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gate's part of the first bias is added to h instead of to z (E1)."""
    bias, down = weights.gate_up_proj_bias, weights.down_proj_bias
    if bias is None:
        return experts(inner, x, ids, w, weights)
    gate = bias[:, 0::2] if _interleaved(weights) else bias[:, : weights.intermediate_size]
    wide = torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32)
    late = torch.einsum("ehi,ei->eh", weights.down_proj.to(wide), gate.to(wide))
    late = late if down is None else late + down
    return experts(inner, x, ids, w, replace(weights, gate_up_proj_bias=None, down_proj_bias=late))


@slot_mutant
def bias_of_neighbour(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each expert adds its neighbour's second bias (E1)."""
    bias = weights.down_proj_bias
    return experts(inner, x, ids, w, replace(weights, down_proj_bias=None if bias is None else bias.roll(1, 0)))


@slot_mutant
def bias_unweighted(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The second bias is added after the routing weight instead of before (C1)."""
    return with_own_down_bias(inner, x, ids, w, weights, torch.ones_like(w))


def with_own_down_bias(
    inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, factor: Tensor
) -> Tensor:
    """The layer without its second bias, plus that bias times ``factor``, added outside."""
    bias = weights.down_proj_bias
    if bias is None:
        return experts(inner, x, ids, w, weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    valid = (ids >= 0) & (ids < weights.num_experts)
    own = torch.where(valid, factor, torch.zeros_like(factor)).to(wide)
    added = torch.einsum("tk,tkh->th", own, bias.to(wide)[torch.where(valid, ids, 0).long()])
    return (experts(inner, x, ids, w, replace(weights, down_proj_bias=None)).to(wide) + added).to(x.dtype)


@dense_mutant
def bf16_accumulation(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The down projection's partial sums are kept in bf16 (E2)."""
    step = max(1, weights.intermediate_size // 16)
    y: Tensor | None = None
    for start in range(0, weights.intermediate_size, step):
        part = experts(inner, x, ids, w, _some_columns(weights, start, start + step)).to(torch.bfloat16)
        y = part if y is None else y + part
    assert y is not None
    return y.to(x.dtype)


def _some_columns(weights: MoEWeights, start: int, stop: int) -> MoEWeights:
    """The layer cut down to some intermediate columns; the first cut keeps the second bias."""
    rows = torch.arange(weights.gate_up_proj.shape[1], device=weights.gate_up_proj.device)
    if weights.config.gated:
        rows = rows.view(-1, 2) if _interleaved(weights) else rows.view(2, -1).t()
    cut = rows[start:stop].reshape(-1) if _interleaved(weights) else rows[start:stop].t().reshape(-1)
    columns = slice(start, min(stop, weights.intermediate_size))
    parameters = weights.parameters()
    changed: dict[str, Tensor] = {
        n: parameters[n][:, cut] for n in ("gate_up_proj", "gate_up_proj_bias", "gate_up_lora_b") if n in parameters
    }
    changed |= {n: parameters[n][:, :, columns] for n in ("down_proj", "down_lora_a") if n in parameters}
    smaller = weights.with_parameters(changed)
    return smaller if start == 0 else replace(smaller, down_proj_bias=None)


def _interleaved(weights: MoEWeights) -> bool:
    return weights.config.gate_up_layout == "interleaved"


@slot_mutant
def another_activation(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A similar activation: the tanh approximation for erf, SiLU for squared ReLU (E1)."""
    others = {"geglu": "geglu_tanh", "geglu_tanh": "geglu", "gelu": "gelu_tanh", "gelu_tanh": "gelu", "relu2": "silu"}
    activation = others.get(weights.config.activation, weights.config.activation)
    return experts(inner, x, ids, w, configured(weights, activation=activation))


@slot_mutant
def weight_on_output_for_input(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """scale_input is forgotten (C3)."""
    return experts(inner, x, ids, w, configured(weights, scale_input=False))


@slot_mutant
def weight_on_both_sides(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """With scale_input, the weight multiplies the output as well (C3)."""
    if not weights.config.scale_input:
        return experts(inner, x, ids, w, weights)
    parts = slot_by_slot(inner, x, ids, w, weights)
    return torch.stack([part * w[:, k : k + 1].nan_to_num(0.0) for k, part in enumerate(parts)]).sum(0).to(x.dtype)
