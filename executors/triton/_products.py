"""Launches the kernels that multiply rows by their expert's matrix, and the one that sums slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executors.triton import _configs
from executors.triton._configs import Tile
from executors.triton._device import Device
from executors.triton._grouping import Groups
from executors.triton.kernels.combine import combine_kernel
from executors.triton.kernels.products import down_kernel, up_kernel

UNIT = 16  # elements: what Triton must know sizes and strides to be multiples of, to load widely
COMBINED = 1024  # elements of y in one program


class Act(NamedTuple):
    """The parts of ``MoEConfig`` that shape the activation."""

    activation: str
    alpha: float
    limit: float | None
    up_offset: float
    layout: str  # "" where there is no gate


def are_aligned(*projections: Tensor) -> bool:
    """Whether projections [E, m, k] can be loaded 16 bytes at a time, along k or along m."""
    return all(map(_is_matrix_aligned, projections))


def with_aligned_rows(x: Tensor) -> Tensor:
    """X [T, H] such that it can be loaded 16 bytes at a time along H, a multiple of 16: itself, or a copy."""
    aligned = x.stride(1) == 1 and _is_whole(x, x.stride(0))
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _is_matrix_aligned(matrices: Tensor) -> bool:
    (experts, *sizes), (expert, *inner) = matrices.shape, matrices.stride()
    return 1 in inner and _is_whole(matrices, *sizes, max(inner), 0 if experts == 1 else expert)


def _is_whole(tensor: Tensor, *places: int) -> bool:
    return tensor.data_ptr() % 16 == 0 and all(place % UNIT == 0 for place in places)


def up(
    x: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    groups: Groups,
    top_k: int,
    act: Act,
    tile: Tile,
    device: Device,
    precision: str,
    aligned: bool,
) -> Tensor:
    """H [S, I] = act(x W^T + b), rows sorted by expert; with topk_weights, x is multiplied by them (C3)."""
    both, hidden = matrices.shape[1:]
    intermediate = both // 2 if act.layout else both
    if not act.layout:
        tile = tile._replace(block_n=min(tile.block_n, 128))  # as many results as of a gated tile: gelu of more spills
    columns_of_tile = tile.block_n // 2 if act.layout else tile.block_n
    h = torch.empty(groups.order.numel(), intermediate, dtype=x.dtype, device=x.device)
    box = columns_of_tile if act.layout == "concatenated" else tile.block_n
    w, tma = _operand(matrices, box, tile, device, aligned)
    up_kernel[_grid(groups, triton.cdiv(intermediate, columns_of_tile), tile, device)](
        x,
        w,
        x if bias is None else bias,
        x if topk_weights is None else topk_weights,
        groups.order,
        groups.tiles,
        h,
        both,
        hidden,
        *x.stride(),
        *matrices.stride(),
        *((0, 0) if bias is None else bias.stride()),
        TOP_K=top_k,
        HAS_BIAS=bias is not None,
        SCALE_INPUT=topk_weights is not None,
        LAYOUT=act.layout,
        ACTIVATION=act.activation,
        ALPHA=act.alpha,
        LIMIT=act.limit,
        UP_OFFSET=act.up_offset,
        PRECISION=precision,
        EVEN_K=hidden % tile.block_k == 0,
        TMA=tma,
        **_blocks(tile),
    )
    return h


def down(
    h: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    groups: Groups,
    tile: Tile,
    device: Device,
    precision: str,
    aligned: bool,
) -> Tensor:
    """The slots' outputs [S, H] = (h W^T + b), with topk_weights times them; empty slots are not written."""
    hidden, intermediate = matrices.shape[1:]
    out = torch.empty(h.shape[0], hidden, dtype=h.dtype, device=h.device)
    w, tma = _operand(matrices, tile.block_n, tile, device, aligned)
    rows = TensorDescriptor(h, list(h.shape), list(h.stride()), [tile.block_m, tile.block_k]) if tma else h
    down_kernel[_grid(groups, triton.cdiv(hidden, tile.block_n), tile, device)](
        rows,
        w,
        h if bias is None else bias,
        h if topk_weights is None else topk_weights,
        groups.order,
        groups.tiles,
        out,
        hidden,
        intermediate,
        *matrices.stride(),
        *((0, 0) if bias is None else bias.stride()),
        HAS_BIAS=bias is not None,
        WEIGHTED=topk_weights is not None,
        PRECISION=precision,
        EVEN_K=intermediate % tile.block_k == 0,
        TMA=tma,
        **_blocks(tile),
    )
    return out


def combine(slots: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """Y [T, H]: the sum of each token's slots [S, H], in increasing k (C1)."""
    (tokens, top_k), hidden = topk_ids.shape, slots.shape[1]
    y = torch.empty(tokens, hidden, dtype=slots.dtype, device=slots.device)
    block_h = min(COMBINED, triton.next_power_of_2(hidden))
    block_t = COMBINED // block_h
    combine_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(hidden, block_h))](
        slots, topk_ids, y, tokens, num_experts, hidden, TOP_K=top_k, BLOCK_T=block_t, BLOCK_H=block_h
    )
    return y


def _operand(matrices: Tensor, box: int, tile: Tile, device: Device, aligned: bool) -> tuple[Any, str]:
    """Matrices [E, m, k] as a kernel takes them: a descriptor where the device has them, else the tensor."""
    narrow = matrices.element_size() == 2  # those of fp32 go through registers anyway, and would spill
    kind, stored, block = "rows", matrices, [1, box, tile.block_k]
    if matrices.stride(2) != 1:
        kind, stored, block = "columns", matrices.transpose(1, 2), [1, tile.block_k, box]
    (experts, outer, inner), (of_expert, of_outer, _) = stored.shape, stored.stride()
    of_expert = of_expert if experts > 1 else outer * of_outer
    nested = of_outer >= inner and of_expert >= outer * of_outer and of_expert % of_outer == 0
    if not (aligned and narrow and nested and _configs.FAMILIES[device.family].descriptors):
        return matrices, ""
    return TensorDescriptor(matrices, [experts, outer, inner], [of_expert, of_outer, 1], block), kind


def _grid(groups: Groups, column_tiles: int, tile: Tile, device: Device) -> tuple[int]:
    """Programs: one for each tile that there can be, or no more than run at once."""
    tiles = max(1, groups.most_tiles * column_tiles)
    return (min(device.multiprocessors * tile.per_sm, tiles) if tile.per_sm else tiles,)


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": _configs.GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
