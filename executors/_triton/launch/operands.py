"""Arguments of the product kernels: how a call runs, operands, adapters and grids."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executors._triton import configs
from executors._triton.configs import KernelConfig, Tile
from executors._triton.device import Device
from executors._triton.launch.grouping import Groups
from executors._triton.launch.packed import CodeFormat, codes_of, is_aligned
from moe_ref.types import PackedTensor

Matrices = Tensor | PackedTensor  # [E, m, k]; of one in 4 bits no gradient is ever asked for

UNIT = 16  # what Triton must know addresses, sizes and strides to be multiples of, to load widely
LEAST_RANKS, RANKS = 16, 64  # of an adapter at a time


class LaunchPlan(NamedTuple):
    """How the products of one call run.

    Attributes:
        groups: the slots sorted by expert.
        top_k: K.
        config: the tiles.
        device: what runs them.
        precision: "ieee" or "tf32".
        aligned: whether all projections can be loaded 16 bytes at a time.
        bounds: [E + 1] where the row tiles of each expert begin, if 4-bit projections are decoded before the products,
            a part of the experts at a time; None if they are decoded in them.
    """

    groups: Groups
    top_k: int
    config: KernelConfig
    device: Device
    precision: str
    aligned: bool
    bounds: Tensor | None = None


class Adapter(NamedTuple):
    """An adapter's part of a product: ``inner`` [S, r] times ``factor`` [E, n, r] transposed, of any float dtype.

    Rows of inner were divided by ``powers`` [S], unless that is None.
    """

    inner: Tensor
    powers: Tensor | None
    factor: Tensor


class Operand(NamedTuple):
    """A kernel's arguments for matrices [E, m, k].

    Attributes:
        w: the tensor, a descriptor of it, or codes of it in 4 bits.
        scales: of codes, else empty.
        strides: three, of elements; of codes of bytes.
        format: of codes, or None.
        tma: "rows" or "columns" for a descriptor, else "".
        ahead: whether pointers are computed before the loop over k: for matrices in 16 bits in which k is not last in
            memory. Products in fp32 are bound by their multiplications, and would spill.
    """

    w: Any
    scales: tuple[Any, ...]
    strides: tuple[int, ...]
    format: CodeFormat | None
    tma: str
    ahead: bool = False


def are_aligned(*projections: Matrices, decoded: bool = False) -> bool:
    """Whether projections [E, m, k] can be loaded 16 bytes at a time, along k or along m; or 8, in 4 bits.

    With ``decoded``, the decoded numbers of a 4-bit projection count instead of its codes.
    """
    return all(
        is_aligned(own, decoded=decoded) if isinstance(own, PackedTensor) else _is_matrix_aligned(own)
        for own in projections
    )


def readable(rows: Tensor, aligned: bool) -> Tensor:
    """Rows [T, H]; a copy if they are misaligned and the projections are not.

    So the projections alone decide on the configuration (C2).
    """
    able = rows.stride(1) == 1 and _is_whole(rows, rows.stride(0))
    return rows if able or not aligned else rows.clone(memory_format=torch.contiguous_format)


def _is_matrix_aligned(matrices: Tensor) -> bool:
    (experts, *sizes), (expert, *inner) = matrices.shape, matrices.stride()
    return 1 in inner and _is_whole(matrices, *sizes, max(inner), 0 if experts == 1 else expert)


def _is_whole(tensor: Tensor, *places: int) -> bool:
    return gcd(tensor.data_ptr(), *places) % UNIT == 0  # the address is in bytes, the others in elements


def narrow_for_adapter(adapter: Adapter | None, tile: Tile, plan: LaunchPlan) -> Tile:
    """The tile, no wider than an adapter whose dtype is not the rows' allows."""
    if adapter is None or adapter.factor.dtype == adapter.inner.dtype:
        return tile
    return tile.no_wider_than(_mixed_dtype_limits(adapter, plan)[1])


def adapter_of(
    adapter: Adapter | None, like: Tensor, plan: LaunchPlan
) -> tuple[Tensor, Tensor | None, Tensor, int, int]:
    """What a kernel takes of an adapter: inner, powers, factor, rank, and ranks at a time, which are 0 without one."""
    if adapter is None:
        return like, None, like.new_empty(0, 0, 0), 0, 0
    rank, same = adapter.factor.shape[2], adapter.factor.dtype == adapter.inner.dtype
    return *adapter, rank, ranks_at_a_time(rank) if same else _mixed_dtype_limits(adapter, plan)[0]


def _mixed_dtype_limits(adapter: Adapter, plan: LaunchPlan) -> tuple[int, int]:
    """Ranks at a time, and the most columns of a tile, for a factor whose dtype is not the rows'.

    For rows that are not in bf16 the adapter's products are in fp32, which takes more registers and shared memory.
    """
    three_terms = adapter.inner.dtype == torch.bfloat16
    return configs.FAMILIES[plan.device.family].mixed_dtype_limits if three_terms else configs.LEAST_MIXED_LIMITS


def ranks_at_a_time(rank: int) -> int:
    """A power of two that tensor cores take."""
    return min(RANKS, max(LEAST_RANKS, triton.next_power_of_2(rank)))


def operand(matrices: Matrices, box: int, tile: Tile, plan: LaunchPlan, halves: int = 1) -> Operand:
    """Matrices [E, m, k] as a kernel takes them: codes, a descriptor where the device has them, or the tensor.

    Args:
        matrices: of a projection, or their transposes.
        box: neighbouring columns that one load takes.
        tile: of the product.
        plan: of the call.
        halves: 2 if tiles begin at m / 2 too, else 1.
    """
    if isinstance(matrices, PackedTensor):
        codes = codes_of(matrices, (box, tile.block_k), halves)
        return Operand(codes.codes, codes.scales, codes.strides, codes.format, "")
    narrow = matrices.element_size() == 2  # fp32 goes through registers anyway, and would spill
    kind, stored, block = "rows", matrices, [1, box, tile.block_k]
    if matrices.stride(2) != 1:
        kind, stored, block = "columns", matrices.transpose(1, 2), [1, tile.block_k, box]
    (experts, outer, inner), (of_expert, of_outer, _) = stored.shape, stored.stride()
    of_expert = of_expert if experts > 1 else outer * of_outer
    nested = of_outer >= inner and of_expert >= outer * of_outer and of_expert % of_outer == 0
    if not (plan.aligned and narrow and nested and configs.FAMILIES[plan.device.family].descriptors):
        return Operand(matrices, (), matrices.stride(), None, "", narrow and matrices.stride(2) != 1)
    descriptor = TensorDescriptor(matrices, [experts, outer, inner], [of_expert, of_outer, 1], block)
    return Operand(descriptor, (), matrices.stride(), None, kind)


def grid(plan: LaunchPlan, column_tiles: int, tile: Tile) -> tuple[int]:
    """The number of programs: one for each tile that there can be, or no more than run at once."""
    tiles = max(1, plan.groups.most_tiles * column_tiles)
    return (min(plan.device.multiprocessors * tile.per_sm, tiles) if tile.per_sm else tiles,)


def blocks(tile: Tile) -> dict[str, int]:
    """A tile as a kernel's arguments."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": configs.GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
