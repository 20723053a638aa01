"""Launches the kernels that multiply rows by their expert's matrix, and the one that sums slots."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executors._base.arguments import Activation
from executors._triton import configs
from executors._triton.configs import Tile
from executors._triton.kernels.adapters import inner_kernel
from executors._triton.kernels.combine import combine_kernel
from executors._triton.kernels.products import down_kernel, up_kernel
from executors._triton.launch.decode import parts_of
from executors._triton.launch.narrow import Narrow, between
from executors._triton.launch.operands import (
    Adapter,
    LaunchPlan,
    Matrices,
    adapter_of,
    blocks,
    grid,
    narrow_for_adapter,
    operand,
    ranks_at_a_time,
)
from executors._triton.launch.packed import is_fused

COMBINED = 1024  # elements of y in one program
HALF_AS_WIDE = ("relu2", "gelu", "gelu_tanh", "silu", "geglu")  # activations that spill in a wider tile
ROWS_OF_WARP = 16  # the most rows of a warp where an adapter's first factor is multiplied in fp32; more spill


def up(
    x: Tensor,
    matrices: Matrices,
    bias: Tensor | None,
    adapter: Adapter | None,
    topk_weights: Tensor | None,
    act: Activation,
    tile: Tile,
    plan: LaunchPlan,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """H [S, I] = act(z), and z = x W^T + b, [S, J], or no rows of it; rows are sorted by expert.

    With topk_weights, they multiply x (C3).
    """
    both, hidden = matrices.shape[1:]
    intermediate = both // 2 if act.layout else both
    dtype = between(x.dtype)
    widest = _widest(x.dtype, plan)
    if act.name in HALF_AS_WIDE or act.has_softcap:
        widest //= 2
    if act.layout == "interleaved" and dtype != x.dtype:  # pairs of fp32 spill too
        widest = min(widest, 128)
    tile = narrow_for_adapter(adapter, tile, plan).no_wider_than(widest)
    columns_of_tile = tile.block_n // 2 if act.layout else tile.block_n
    slots = plan.groups.order.numel()
    h = torch.empty(slots, intermediate, dtype=dtype, device=x.device)
    z = torch.empty(slots if keep_z else 0, both, dtype=dtype, device=x.device)
    box = columns_of_tile if act.layout == "concatenated" else tile.block_n
    inner, inner_powers, factor, rank, block_r = adapter_of(adapter, x, plan)
    halves = 2 if act.layout == "concatenated" else 1
    for own, part in parts_of(matrices, plan):
        of_w = operand(own, box, tile, plan, halves)
        up_kernel[grid(plan, triton.cdiv(intermediate, columns_of_tile), tile)](
            x,
            of_w.w,
            of_w.scales,
            x if bias is None else bias,
            x if topk_weights is None else topk_weights,
            inner,
            inner_powers,
            factor,
            plan.groups.order,
            plan.groups.tiles,
            *part,
            h,
            z,
            both,
            hidden,
            rank,
            x.stride(),
            of_w.strides,
            (0, 0) if bias is None else bias.stride(),
            factor.stride(),
            TOP_K=plan.top_k,
            HAS_BIAS=bias is not None,
            SCALE_INPUT=topk_weights is not None,
            STORE_Z=keep_z,
            LAYOUT=act.layout,
            ACTIVATION=act.name,
            ALPHA=act.alpha,
            LIMIT=act.limit,
            UP_OFFSET=act.up_offset,
            LATE=act.clamp == "after",
            GATE_SOFTCAP=act.gate_softcap,
            UP_SOFTCAP=act.up_softcap,
            PRECISION=plan.precision,
            EVEN_K=hidden % tile.block_k == 0,
            PART=part.last > 0,
            FORMAT=of_w.format,
            enable_fp_fusion=is_fused(of_w.format),
            TMA=of_w.tma,
            AHEAD=of_w.ahead,
            BLOCK_R=block_r,
            **blocks(tile),
        )
    return h, z


def down(
    rows: Narrow,
    matrices: Matrices,
    bias: Tensor | None,
    adapter: Adapter | None,
    topk_weights: Tensor | None,
    tile: Tile,
    plan: LaunchPlan,
) -> Tensor:
    """The slots' (h W^T + b) [S, H], times topk_weights if given; empty slots are not written.

    ``rows`` are h [S, I].
    """
    h = rows.values
    hidden, inner_size = matrices.shape[1:]
    tile = narrow_for_adapter(adapter, tile, plan).no_wider_than(_widest(h.dtype, plan))
    out = torch.empty(h.shape[0], hidden, dtype=between(h.dtype), device=h.device)
    inner, inner_powers, factor, rank, block_r = adapter_of(adapter, h, plan)
    for own, part in parts_of(matrices, plan):
        of_w = operand(own, tile.block_n, tile, plan)
        own_h = TensorDescriptor(h, list(h.shape), list(h.stride()), [tile.block_m, tile.block_k]) if of_w.tma else h
        down_kernel[grid(plan, triton.cdiv(hidden, tile.block_n), tile)](
            own_h,
            rows.powers,
            of_w.w,
            of_w.scales,
            h if bias is None else bias,
            h if topk_weights is None else topk_weights,
            inner,
            inner_powers,
            factor,
            plan.groups.order,
            plan.groups.tiles,
            *part,
            out,
            hidden,
            inner_size,
            rank,
            of_w.strides,
            (0, 0) if bias is None else bias.stride(),
            factor.stride(),
            HAS_BIAS=bias is not None,
            WEIGHTED=topk_weights is not None,
            PRECISION=plan.precision,
            EVEN_K=inner_size % tile.block_k == 0,
            PART=part.last > 0,
            FORMAT=of_w.format,
            enable_fp_fusion=is_fused(of_w.format),
            TMA=of_w.tma,
            AHEAD=of_w.ahead,
            BLOCK_R=block_r,
            **blocks(tile),
        )
    return out


def _widest(dtype: torch.dtype, plan: LaunchPlan) -> int:
    """The most columns of a tile for operands of that dtype: fewer if results are wider than operands (E7)."""
    return configs.WIDEST if between(dtype) == dtype else configs.FAMILIES[plan.device.family].widened


def inner(narrow: Narrow, factor: Tensor, scaling: float, plan: LaunchPlan, *, of_tokens: bool) -> Tensor:
    """[S, r] Rows times their expert's factor [E, r, k] transposed, times scaling, sorted by expert.

    Args:
        narrow: rows [T, k] where ``of_tokens``, else [S, k] sorted by expert.
        factor: of any float dtype and strides.
        scaling: of the adapter.
        plan: of the call.
        of_tokens: whether rows are gathered.
    """
    rows = narrow.values
    rank, size = factor.shape[1:]
    tile = plan.config.inner
    if rows.dtype == torch.float16 and factor.dtype != rows.dtype:
        tile = tile._replace(warps=max(tile.warps, tile.block_m // ROWS_OF_WARP))
    out = torch.empty(plan.groups.order.numel(), rank, dtype=between(rows.dtype), device=rows.device)
    block_r = ranks_at_a_time(rank)
    inner_kernel[grid(plan, triton.cdiv(rank, block_r), tile)](
        rows,
        narrow.powers,
        factor,
        plan.groups.order,
        plan.groups.tiles,
        out,
        rank,
        size,
        scaling,
        rows.stride(),
        factor.stride(),
        TOP_K=plan.top_k if of_tokens else 0,
        PRECISION=plan.precision,
        EVEN_K=size % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_R=block_r,
        BLOCK_K=tile.block_k,
        GROUP_M=configs.GROUP_M,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def combine(
    slots: Tensor, dtype: torch.dtype, topk_ids: Tensor, num_experts: int, topk_weights: Tensor | None = None
) -> Tensor:
    """Y [T, H]: the sum of each token's slots [S, H], times their weights if given, in increasing k (C1).

    ``dtype`` is y's.
    """
    (tokens, top_k), hidden = topk_ids.shape, slots.shape[1]
    y = torch.empty(tokens, hidden, dtype=dtype, device=slots.device)
    block_h = min(COMBINED, triton.next_power_of_2(hidden))
    block_t = COMBINED // block_h
    combine_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(hidden, block_h))](
        slots,
        topk_ids,
        slots if topk_weights is None else topk_weights,
        y,
        tokens,
        num_experts,
        hidden,
        TOP_K=top_k,
        WEIGHTED=topk_weights is not None,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
    )
    return y
