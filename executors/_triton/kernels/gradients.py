"""The backward pass of a layer, element by element: gradients of z, of weights of slots, of biases (D1 to D3).

Sums of products keep an element for each place of a block, and add over lanes once, after the loop. Were a product
itself added over lanes, the compiler might fuse it into the first of these sums. Each lane would then round another
term, and the lane that stores last would decide on the last bit (C1).
"""

import triton
import triton.language as tl

from executors._triton.kernels.activation import act, gated, gated_slopes, slope
from executors._triton.kernels.addresses import offset


@triton.jit
def dz_kernel(
    dh,  # [S, N] rows sorted by expert: dy times the down projection; N = I; read for dz and weights
    z,  # [S, J] rows sorted by expert, J = 2I if gated, else I
    topk_weights,  # [S], read where WEIGHTED
    dy,  # [T, H], read where HAS_BIAS
    bias,  # [E, H] of the down projection, read where HAS_BIAS
    order,  # [S] the slot of each row
    tiles,  # [1 + tiles, 3] from kernels.grouping
    dz,  # [S, J] out where STORE_DZ
    h,  # [S, N] out where STORE_H: times the weight where WEIGHTED
    d_weights,  # [S] out where STORE_WEIGHTS, each row at its slot
    N,
    H,
    dy_strides,
    bias_strides,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STORE_DZ: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAYOUT: tl.constexpr,  # "concatenated", "interleaved", or "" for no gate
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LATE: tl.constexpr,  # whether LIMIT clamps what comes after the activation
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dz, h and the gradients of the weights, <dh, h> + <dy, b>, for a few rows of a row tile.

    dh comes from dy without the weight, so <dh, h> needs no division (D3). The weight multiplies dz and h.
    """
    if tl.program_id(0) < tl.load(tiles):
        record = tiles + 3 * (tl.program_id(0) + 1)
        row, end = tl.load(record + 1) + tl.program_id(1) * BLOCK_M, tl.load(record + 2)
        rows = row + tl.arange(0, BLOCK_M)
        slots = tl.load(order + tl.minimum(rows, end - 1))
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scale = tl.full((BLOCK_M, 1), 1.0, tl.float32)
        if WEIGHTED:
            scale = tl.load(topk_weights + slots).to(tl.float32)[:, None]
        for first in range(0, N, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            offsets = offset(rows, N)[:, None] + columns[None, :]
            mask = (rows < end)[:, None] & (columns < N)[None, :]
            if STORE_DZ or STORE_WEIGHTS:
                of_dh = tl.load(dh + offsets, mask=mask, other=0.0).to(tl.float32)
            z_offsets, z_mask = offsets, mask
            if LAYOUT == "interleaved":
                both = 2 * first + tl.arange(0, 2 * BLOCK_N)
                z_offsets = offset(rows, 2 * N)[:, None] + both[None, :]
                z_mask = (rows < end)[:, None] & (both < 2 * N)[None, :]
                pairs = tl.load(z + z_offsets, mask=z_mask, other=0.0).to(tl.float32)
                gate, up = tl.split(pairs.reshape(BLOCK_M, BLOCK_N, 2))
            elif LAYOUT == "concatenated":
                z_offsets = offset(rows, 2 * N)[:, None] + columns[None, :]
                gate = tl.load(z + z_offsets, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(z + z_offsets + N, mask=mask, other=0.0).to(tl.float32)
            else:
                gate = tl.load(z + z_offsets, mask=mask, other=0.0).to(tl.float32)
                up = gate
            if STORE_WEIGHTS or STORE_H:
                if LAYOUT == "":
                    value = act(gate, ACTIVATION, ALPHA)
                else:
                    value = gated(gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET, LATE, GATE_SOFTCAP, UP_SOFTCAP)
                if STORE_WEIGHTS:
                    total += of_dh * value
                if STORE_H:
                    tl.store(h + offsets, (value * scale).to(h.dtype.element_ty), mask=mask)
            if STORE_DZ:
                of_dh *= scale
                if LAYOUT == "":
                    tl.store(dz + offsets, (of_dh * slope(gate, ACTIVATION, ALPHA)).to(dz.dtype.element_ty), mask=mask)
                else:
                    of_gate, of_up = gated_slopes(
                        gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET, LATE, GATE_SOFTCAP, UP_SOFTCAP
                    )
                    if LAYOUT == "interleaved":
                        pairs = tl.join(of_dh * of_gate, of_dh * of_up).reshape(BLOCK_M, 2 * BLOCK_N)
                        tl.store(dz + z_offsets, pairs.to(dz.dtype.element_ty), mask=z_mask)
                    else:
                        tl.store(dz + z_offsets, (of_dh * of_gate).to(dz.dtype.element_ty), mask=mask)
                        tl.store(dz + z_offsets + N, (of_dh * of_up).to(dz.dtype.element_ty), mask=mask)
        if STORE_WEIGHTS:
            if HAS_BIAS:
                y_rows = offset(slots // TOP_K, dy_strides[0])[:, None]
                b_row = offset(tl.load(record), bias_strides[0])
                for first in range(0, H, BLOCK_N):
                    columns = first + tl.arange(0, BLOCK_N)
                    mask = (rows < end)[:, None] & (columns < H)[None, :]
                    of_dy = tl.load(dy + y_rows + offset(columns, dy_strides[1])[None, :], mask=mask, other=0.0)
                    of_bias = tl.load(bias + b_row + offset(columns, bias_strides[1]), mask=columns < H, other=0.0)
                    total += of_dy.to(tl.float32) * of_bias.to(tl.float32)[None, :]
            tl.store(d_weights + slots, tl.sum(total, axis=1).to(d_weights.dtype.element_ty), mask=rows < end)


@triton.jit
def input_weights_kernel(
    d_inputs,  # [S, N] each row at its slot: gradients of the experts' inputs; empty slots hold anything
    x,  # [T, N]
    topk_ids,  # [S]
    d_weights,  # [S] out
    num_slots,
    num_experts,
    N,
    x_strides,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of weights that multiply the experts' input: <d(w x), x>, 0 for empty slots (C3, D3)."""
    slots = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.load(topk_ids + slots, mask=slots < num_slots, other=-1)
    full = ((ids >= 0) & (ids < num_experts))[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = full & (columns < N)[None, :]
        values = tl.load(d_inputs + offset(slots, N)[:, None] + columns[None, :], mask=mask, other=0.0)
        offsets = offset(slots // TOP_K, x_strides[0])[:, None] + offset(columns, x_strides[1])[None, :]
        total += values.to(tl.float32) * tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_weights + slots, tl.sum(total, axis=1).to(d_weights.dtype.element_ty), mask=slots < num_slots)


@triton.jit
def sums_kernel(
    values,  # [T, N] where TOP_K, else [S, N] sorted by expert
    topk_weights,  # [S], read where WEIGHTED
    order,  # [S] the slot of each row, read where TOP_K
    group_offsets,  # [E + 1]
    out,  # [E, N] out
    N,
    strides,
    out_strides,
    TOP_K: tl.constexpr,  # 0 for rows that are sorted already
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of each expert's rows, times their weights where WEIGHTED; 0 for an expert without rows (D2).

    Every BLOCK_M-th row is added up in order, and then these BLOCK_M sums: warps meet once, not in every step.
    """
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(group_offsets + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(tl.load(group_offsets + expert), end, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        sources = rows
        if TOP_K:
            slots = tl.load(order + tl.minimum(rows, end - 1))
            sources = slots // TOP_K
        offsets = offset(sources, strides[0])[:, None] + offset(columns, strides[1])[None, :]
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        block = tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            block *= tl.load(topk_weights + slots, mask=rows < end, other=0.0).to(tl.float32)[:, None]
        total += block
    offsets = offset(expert, out_strides[0]) + offset(columns, out_strides[1])
    tl.store(out + offsets, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=columns < N)
