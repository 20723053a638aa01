"""The forward pass as a custom operator of torch: group, up, down, combine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from executors.triton import _configs, _interpreter, _products
from executors.triton._autograd import no_backward
from executors.triton._device import INTERPRETED, Device, device_guard, device_of
from executors.triton._grouping import group
from executors.triton._products import Act
from moe_ref.types import GATED


@torch.library.custom_op("moe_ref::triton", mutates_args=())
def operator(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    scale_input: bool,
    activation: str,
    alpha: float,
    limit: float | None,
    up_offset: float,
    layout: str,
    batch_invariant: bool,
) -> Tensor:
    """Y [T, H] from x [T, H], topk_ids and topk_weights [T, K], and the layer's parameters."""
    if INTERPRETED:
        _interpreter.mend()
    if not topk_ids.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    projections = gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias
    act = Act(activation, alpha, limit, up_offset, layout if activation in GATED else "")
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    with device_guard(x):
        return forward(
            x, topk_ids, topk_weights, projections, scale_input, act, device_of(x.device), tf32, batch_invariant
        )


def forward(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    projections: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    scale_input: bool,
    act: Act,
    device: Device,
    tf32: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """Y [T, H]: four launches, or six for more than 1024 slots."""
    top_k, num_experts = topk_ids.shape[1], projections[0].shape[0]
    gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias = projections
    ids, slot_weights = topk_ids.contiguous(), topk_weights.contiguous()
    aligned = _products.are_aligned(gate_up_proj, down_proj)
    x = _products.with_aligned_rows(x) if aligned else x  # so that the weights alone decide on the configuration (C2)
    regime = _configs.regime_of(
        device.family,
        narrow=x.element_size() == 2,
        aligned=aligned,
        rows=ids.numel() / num_experts,
        batch_invariant=batch_invariant,
    )
    precision = "tf32" if tf32 else "ieee"
    before, after = (slot_weights, None) if scale_input else (None, slot_weights)
    groups = group(ids, num_experts, regime.up.block_m)
    h = _products.up(
        x, gate_up_proj, gate_up_proj_bias, before, groups, top_k, act, regime.up, device, precision, aligned
    )
    slots = _products.down(h, down_proj, down_proj_bias, after, groups, regime.down, device, precision, aligned)
    return _products.combine(slots, ids, num_experts)


@operator.register_fake
def _(x: Tensor, *_others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


operator.register_autograd(no_backward)
