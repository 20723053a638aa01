"""Launches the kernels that multiply rows by their expert's matrix, and the one that sums slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executors.triton import _configs
from executors.triton._configs import Regime, Tile
from executors.triton._device import Device
from executors.triton._grouping import Groups
from executors.triton.kernels.adapters import inner_kernel
from executors.triton.kernels.combine import combine_kernel
from executors.triton.kernels.products import down_kernel, up_kernel

UNIT = 16  # elements: what Triton must know sizes and strides to be multiples of, to load widely
COMBINED = 1024  # elements of y in one program
HALF_AS_WIDE = ("relu2", "gelu", "gelu_tanh", "silu", "geglu")  # a wider tile's activation spills
LEAST_RANKS, RANKS = 16, 64  # of an adapter at a time


class Act(NamedTuple):
    """The parts of ``MoEConfig`` that shape the activation."""

    activation: str
    alpha: float
    limit: float | None
    up_offset: float
    layout: str  # "" where there is no gate


class Plan(NamedTuple):
    """How the products of one call run.

    Attributes:
        groups: the slots sorted by expert.
        top_k: K.
        regime: the tiles.
        device: what runs them.
        precision: "ieee" or "tf32".
        aligned: whether all projections can be loaded 16 bytes at a time.
    """

    groups: Groups
    top_k: int
    regime: Regime
    device: Device
    precision: str
    aligned: bool


class Adapter(NamedTuple):
    """An adapter's part of a product: ``inner`` [S, r] times ``factor`` [E, n, r] transposed, of any float dtype."""

    inner: Tensor
    factor: Tensor


def are_aligned(*projections: Tensor) -> bool:
    """Whether projections [E, m, k] can be loaded 16 bytes at a time, along k or along m."""
    return all(map(_is_matrix_aligned, projections))


def readable(rows: Tensor, aligned: bool) -> Tensor:
    """Rows [T, H] as they are, or a copy where only they cannot be loaded 16 bytes at a time along H.

    So the projections alone decide on the configuration (C2).
    """
    able = rows.stride(1) == 1 and _is_whole(rows, rows.stride(0))
    return rows if able or not aligned else rows.clone(memory_format=torch.contiguous_format)


def _is_matrix_aligned(matrices: Tensor) -> bool:
    (experts, *sizes), (expert, *inner) = matrices.shape, matrices.stride()
    return 1 in inner and _is_whole(matrices, *sizes, max(inner), 0 if experts == 1 else expert)


def _is_whole(tensor: Tensor, *places: int) -> bool:
    return tensor.data_ptr() % 16 == 0 and all(place % UNIT == 0 for place in places)


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
    tile = _beside(adapter, tile, plan)
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
    tile = _beside(adapter, tile, plan)
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


def _beside(adapter: Adapter | None, tile: Tile, plan: Plan) -> Tile:
    """The tile, no wider than the adapter beside the matrices allows."""
    if adapter is None or adapter.factor.dtype == adapter.inner.dtype:
        return tile
    return tile._replace(block_n=min(tile.block_n, _apart(adapter, plan)[1]))


def adapter_of(adapter: Adapter | None, like: Tensor, plan: Plan) -> tuple[Tensor, Tensor, int, int]:
    """What a kernel takes of an adapter: inner, factor, rank and how much of it at a time, 0 without one."""
    if adapter is None:
        return like, like.new_empty(0, 0, 0), 0, 0
    rank, same = adapter.factor.shape[2], adapter.factor.dtype == adapter.inner.dtype
    return adapter.inner, adapter.factor, rank, ranks_at_a_time(rank) if same else _apart(adapter, plan)[0]


def _apart(adapter: Adapter, plan: Plan) -> tuple[int, int]:
    """Ranks at a time, and columns of a tile at most, for a factor whose dtype is not the rows'."""
    narrow = (
        adapter.inner.dtype == torch.bfloat16
    )  # beside others the products are in fp32, and need more of everything
    return _configs.FAMILIES[plan.device.family].apart if narrow else _configs.LEAST_APART


def ranks_at_a_time(rank: int) -> int:
    """A power of two that tensor cores take."""
    return min(RANKS, max(LEAST_RANKS, triton.next_power_of_2(rank)))


def operand(matrices: Tensor, box: int, tile: Tile, plan: Plan) -> tuple[Any, str]:
    """Matrices [E, m, k] as a kernel takes them: a descriptor where the device has them, else the tensor."""
    narrow = matrices.element_size() == 2  # those of fp32 go through registers anyway, and would spill
    kind, stored, block = "rows", matrices, [1, box, tile.block_k]
    if matrices.stride(2) != 1:
        kind, stored, block = "columns", matrices.transpose(1, 2), [1, tile.block_k, box]
    (experts, outer, inner), (of_expert, of_outer, _) = stored.shape, stored.stride()
    of_expert = of_expert if experts > 1 else outer * of_outer
    nested = of_outer >= inner and of_expert >= outer * of_outer and of_expert % of_outer == 0
    if not (plan.aligned and narrow and nested and _configs.FAMILIES[plan.device.family].descriptors):
        return matrices, ""
    return TensorDescriptor(matrices, [experts, outer, inner], [of_expert, of_outer, 1], block), kind


def grid(plan: Plan, column_tiles: int, tile: Tile) -> tuple[int]:
    """Programs: one for each tile that there can be, or no more than run at once."""
    tiles = max(1, plan.groups.most_tiles * column_tiles)
    return (min(plan.device.multiprocessors * tile.per_sm, tiles) if tile.per_sm else tiles,)


def blocks(tile: Tile) -> dict[str, int]:
    """A tile as a kernel's arguments."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": _configs.GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
