"""Launches the kernels of the backward pass."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from executors._base.arguments import Activation
from executors._triton.configs import Tile
from executors._triton.kernels.gradients import dz_kernel, input_weights_kernel, sums_kernel
from executors._triton.kernels.outer import outer_kernel
from executors._triton.launch.narrow import Narrow
from executors._triton.launch.operands import LaunchPlan, blocks

SUMMED_ROWS, SUMMED_COLUMNS = 32, 64  # of a program for a bias gradient
ROWS, COLUMNS = 16, 64  # at a time, of an elementwise program; no row tile is smaller


def dz(
    dh: Tensor | None,
    z: Tensor,
    topk_weights: Tensor,
    weighted: bool,
    dy: Tensor,
    bias: Tensor | None,
    act: Activation,
    plan: LaunchPlan,
    *,
    want_dz: bool,
    want_h: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [S, J], h [S, I], and the gradient of topk_weights [T, K], which is <dh, h> + <dy, b> (D3).

    Args:
        dh: [S, I] rows sorted by expert, without the weight; None if only h is wanted.
        z: [S, J] rows sorted by expert.
        topk_weights: [T, K].
        weighted: whether they multiply dz and h.
        dy: [T, H] the upstream gradient.
        bias: [E, H] of the down projection.
        act: the activation.
        plan: of the call.
        want_dz: whether dz is computed; else it has no rows.
        want_h: whether h is computed; else it has no rows.
        want_weights: whether the gradient of topk_weights is computed; else it has no rows.
    """
    assert dh is not None or not (want_dz or want_weights)
    slots, intermediate = z.shape[0], z.shape[1] // 2 if act.layout else z.shape[1]
    found = torch.empty(slots if want_dz else 0, z.shape[1], dtype=z.dtype, device=z.device)
    h = torch.empty(slots if want_h else 0, intermediate, dtype=z.dtype, device=z.device)
    d_weights = torch.zeros_like(topk_weights if want_weights else topk_weights[:0])  # empty slots are not written
    dz_kernel[(max(1, plan.groups.most_tiles), plan.config.up.block_m // ROWS)](
        z if dh is None else dh,
        z,
        topk_weights,
        dy,
        dy if bias is None else bias,
        plan.groups.order,
        plan.groups.tiles,
        found,
        h,
        d_weights,
        intermediate,
        dy.shape[1],
        dy.stride(),
        (0, 0) if bias is None else bias.stride(),
        TOP_K=plan.top_k,
        WEIGHTED=weighted,
        STORE_DZ=want_dz,
        STORE_H=want_h,
        STORE_WEIGHTS=want_weights,
        HAS_BIAS=bias is not None,
        LAYOUT=act.layout,
        ACTIVATION=act.name,
        ALPHA=act.alpha,
        LIMIT=act.limit,
        UP_OFFSET=act.up_offset,
        LATE=act.clamp == "after",
        GATE_SOFTCAP=act.gate_softcap,
        UP_SOFTCAP=act.up_softcap,
        BLOCK_M=ROWS,
        BLOCK_N=COLUMNS if plan.aligned else COLUMNS // 2,
    )
    return found, h, d_weights


def input_weights(d_inputs: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    """The gradient of topk_weights [T, K] under scale_input: <d(w x), x>, 0 for empty slots (C3, D3).

    Args:
        d_inputs: [S, H] the gradients of the experts' inputs, each at its slot.
        x: [T, H].
        topk_ids: [T, K].
        topk_weights: [T, K].
        num_experts: E.
    """
    found = torch.empty_like(topk_weights)
    slots = topk_ids.numel()
    input_weights_kernel[(triton.cdiv(slots, ROWS),)](
        d_inputs,
        x,
        topk_ids,
        found,
        slots,
        num_experts,
        x.shape[1],
        x.stride(),
        TOP_K=topk_ids.shape[1],
        BLOCK_M=ROWS,
        BLOCK_N=COLUMNS,
    )
    return found


def sums(values: Tensor, topk_weights: Tensor | None, like: Tensor, plan: LaunchPlan, *, of_tokens: bool) -> Tensor:
    """The gradient of a bias ``like`` [E, n]: the sum of each expert's rows, in order, times their weights if given.

    Args:
        values: [T, n] where ``of_tokens``, else [S, n] sorted by expert.
        topk_weights: [S], or None.
        like: the bias.
        plan: of the call.
        of_tokens: whether values are gathered.
    """
    assert of_tokens or topk_weights is None
    experts, columns = like.shape
    out = torch.empty_like(like)
    sums_kernel[(triton.cdiv(columns, SUMMED_COLUMNS), experts)](
        values,
        values if topk_weights is None else topk_weights,
        plan.groups.order,
        plan.groups.group_offsets,
        out,
        columns,
        values.stride(),
        out.stride(),
        TOP_K=plan.top_k if of_tokens else 0,
        WEIGHTED=topk_weights is not None,
        BLOCK_M=SUMMED_ROWS,
        BLOCK_N=SUMMED_COLUMNS,
        num_warps=1,  # its lanes meet without shared memory
    )
    return out


def outer(
    a: Narrow,
    b: Narrow,
    like: Tensor,
    plan: LaunchPlan,
    *,
    tokens_a: bool = False,
    tokens_b: bool = False,
    scaled_b: Tensor | None = None,
) -> Tensor:
    """The gradient of matrices ``like`` [E, m, n], in their strides: a^T b over each expert's rows; 0 without rows.

    Args:
        a: [T, m] where ``tokens_a``, else [S, m] sorted by expert.
        b: [T, n] where ``tokens_b``, else [S, n] sorted by expert.
        like: the matrices.
        plan: of the call.
        tokens_a: whether rows of a are gathered.
        tokens_b: whether rows of b are gathered.
        scaled_b: [S] weights of slots that multiply the rows of b, or None.
    """
    out = torch.empty_like(like)
    target, gather, scaled = out, (tokens_a, tokens_b), (False, scaled_b is not None)
    if out.stride(2) != 1:  # results are contiguous along m: compute the transposed product
        a, b, target, gather, scaled = b, a, out.transpose(1, 2), gather[::-1], scaled[::-1]
    experts, m, n = target.shape
    tile = _fitting(plan.config.outer, m, n)
    outer_kernel[(experts * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        a.values,
        b.values,
        a.powers,
        b.powers,
        a.values if scaled_b is None else scaled_b,
        plan.groups.order,
        plan.groups.group_offsets,
        target,
        m,
        n,
        a.values.stride(),
        b.values.stride(),
        target.stride(),
        TOP_K_A=plan.top_k if gather[0] else 0,
        TOP_K_B=plan.top_k if gather[1] else 0,
        SCALED_A=scaled[0],
        SCALED_B=scaled[1],
        PRECISION=plan.precision,
        **blocks(tile),
    )
    return out


def _fitting(tile: Tile, m: int, n: int) -> Tile:
    """The tile, no larger than the matrix, which is narrow for an adapter."""
    block_m = min(tile.block_m, max(16, triton.next_power_of_2(m)))
    block_n = min(tile.block_n, max(16, triton.next_power_of_2(n)))
    smaller = block_m < tile.block_m or block_n < tile.block_n
    return tile._replace(block_m=block_m, block_n=block_n, warps=min(tile.warps, 4) if smaller else tile.warps)
