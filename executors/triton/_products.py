"""Launches the kernels that multiply rows by their expert's matrix, and the one that sums slots."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executors.triton import _configs
from executors.triton._configs import Tile
from executors.triton._operands import Act, Adapter, Plan, adapter_of, beside, blocks, grid, operand, ranks_at_a_time
from executors.triton.kernels.adapters import inner_kernel
from executors.triton.kernels.combine import combine_kernel
from executors.triton.kernels.products import down_kernel, up_kernel

COMBINED = 1024  # elements of y in one program
HALF_AS_WIDE = ("relu2", "gelu", "gelu_tanh", "silu", "geglu")  # a wider tile's activation spills


def up(
    x: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    adapter: Adapter | None,
    topk_weights: Tensor | None,
    act: Act,
    tile: Tile,
    plan: Plan,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """H [S, I] = act(z), rows sorted by expert, and z = x W^T + b, [S, J], or no rows of it.

    With topk_weights, x is multiplied by them (C3).
    """
    both, hidden = matrices.shape[1:]
    intermediate = both // 2 if act.layout else both
    tile = beside(adapter, tile, plan)
    if act.activation in HALF_AS_WIDE:
        tile = tile._replace(block_n=min(tile.block_n, 128))
    columns_of_tile = tile.block_n // 2 if act.layout else tile.block_n
    slots = plan.groups.order.numel()
    h = torch.empty(slots, intermediate, dtype=x.dtype, device=x.device)
    z = torch.empty(slots if keep_z else 0, both, dtype=x.dtype, device=x.device)
    box = columns_of_tile if act.layout == "concatenated" else tile.block_n
    w, tma = operand(matrices, box, tile, plan)
    inner, factor, rank, block_r = adapter_of(adapter, x, plan)
    up_kernel[grid(plan, triton.cdiv(intermediate, columns_of_tile), tile)](
        x,
        w,
        x if bias is None else bias,
        x if topk_weights is None else topk_weights,
        inner,
        factor,
        plan.groups.order,
        plan.groups.tiles,
        h,
        z,
        both,
        hidden,
        rank,
        *x.stride(),
        *matrices.stride(),
        *((0, 0) if bias is None else bias.stride()),
        *factor.stride(),
        TOP_K=plan.top_k,
        HAS_BIAS=bias is not None,
        SCALE_INPUT=topk_weights is not None,
        STORE_Z=keep_z,
        LAYOUT=act.layout,
        ACTIVATION=act.activation,
        ALPHA=act.alpha,
        LIMIT=act.limit,
        UP_OFFSET=act.up_offset,
        PRECISION=plan.precision,
        EVEN_K=hidden % tile.block_k == 0,
        TMA=tma,
        BLOCK_R=block_r,
        **blocks(tile),
    )
    return h, z


def down(
    h: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    adapter: Adapter | None,
    topk_weights: Tensor | None,
    tile: Tile,
    plan: Plan,
) -> Tensor:
    """The slots' (h W^T + b) [S, H], with topk_weights times them; empty slots are not written."""
    hidden, inner_size = matrices.shape[1:]
    tile = beside(adapter, tile, plan)
    out = torch.empty(h.shape[0], hidden, dtype=h.dtype, device=h.device)
    w, tma = operand(matrices, tile.block_n, tile, plan)
    rows = TensorDescriptor(h, list(h.shape), list(h.stride()), [tile.block_m, tile.block_k]) if tma else h
    inner, factor, rank, block_r = adapter_of(adapter, h, plan)
    down_kernel[grid(plan, triton.cdiv(hidden, tile.block_n), tile)](
        rows,
        w,
        h if bias is None else bias,
        h if topk_weights is None else topk_weights,
        inner,
        factor,
        plan.groups.order,
        plan.groups.tiles,
        out,
        hidden,
        inner_size,
        rank,
        *matrices.stride(),
        *((0, 0) if bias is None else bias.stride()),
        *factor.stride(),
        HAS_BIAS=bias is not None,
        WEIGHTED=topk_weights is not None,
        PRECISION=plan.precision,
        EVEN_K=inner_size % tile.block_k == 0,
        TMA=tma,
        BLOCK_R=block_r,
        **blocks(tile),
    )
    return out


def inner(rows: Tensor, factor: Tensor, scaling: float, plan: Plan, *, of_tokens: bool) -> Tensor:
    """[S, r] Rows times their expert's factor [E, r, k] transposed, times scaling, sorted by expert.

    Args:
        rows: [T, k] where ``of_tokens``, else [S, k] sorted by expert.
        factor: of any float dtype and strides.
        scaling: of the adapter.
        plan: of the call.
        of_tokens: whether rows are to be gathered.
    """
    rank, size = factor.shape[1:]
    tile = plan.regime.inner
    out = torch.empty(plan.groups.order.numel(), rank, dtype=rows.dtype, device=rows.device)
    block_r = ranks_at_a_time(rank)
    inner_kernel[grid(plan, triton.cdiv(rank, block_r), tile)](
        rows,
        factor,
        plan.groups.order,
        plan.groups.tiles,
        out,
        rank,
        size,
        scaling,
        *rows.stride(),
        *factor.stride(),
        TOP_K=plan.top_k if of_tokens else 0,
        PRECISION=plan.precision,
        EVEN_K=size % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_R=block_r,
        BLOCK_K=tile.block_k,
        GROUP_M=_configs.GROUP_M,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def combine(slots: Tensor, topk_ids: Tensor, num_experts: int, topk_weights: Tensor | None = None) -> Tensor:
    """Y [T, H]: the sum of each token's slots [S, H], times their weights if given, in increasing k (C1)."""
    (tokens, top_k), hidden = topk_ids.shape, slots.shape[1]
    y = torch.empty(tokens, hidden, dtype=slots.dtype, device=slots.device)
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
