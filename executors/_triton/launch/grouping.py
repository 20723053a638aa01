"""Launches the kernels that sort slots by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from executors._protocol import Unsupported
from executors._triton.kernels.grouping import count_kernel, group_kernel, place_kernel, scan_kernel

CHUNK = 1024  # slots of a program
BLOCK_S = 128  # slots at a time
BLOCK_TILES = 16
MOST_SLOTS = 2**31 - 2 * CHUNK  # slots, and the ends of chunks, are int32
BLOCK_C, SCANNED = 128, 32  # of the sum over chunks: chunks at a time, experts of a program


class Groups(NamedTuple):
    """Slots sorted by expert, on the device.

    Attributes:
        order: [S] int32, the slot in each row; unspecified past the last group.
        group_offsets: [E + 1] int32, exclusive.
        tiles: [1 + tiles, 3] int32: how many row tiles there are, then expert, first row and end of rows of each.
        most_tiles: an upper bound on the row tiles, whatever the routing.
    """

    order: Tensor
    group_offsets: Tensor
    tiles: Tensor
    most_tiles: int


def check_slots(slots: int, name: str) -> None:
    """Raises Unsupported for more slots than an executor of that name can number."""
    if slots > MOST_SLOTS:
        raise Unsupported(f"T*K={slots} slots: must be at most {MOST_SLOTS} for {name}")


def bounds_of(groups: Groups, block_m: int) -> Tensor:
    """[E + 1] int32: where the row tiles of each expert begin in the list, and where they end.

    Args:
        groups: of `group`.
        block_m: rows of a tile, as there.
    """
    sizes = groups.group_offsets.diff()
    counts = (sizes + (block_m - 1)).div(block_m, rounding_mode="floor")
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def group(topk_ids: Tensor, num_experts: int, block_m: int) -> Groups:
    """Sorts the slots stably by expert; empty slots belong to no group (G1, R7).

    One launch for up to 1024 slots, else three.

    Args:
        topk_ids: [T, K] int32 or int64, contiguous; ids outside [0, E) are empty slots.
        num_experts: E.
        block_m: rows of a tile.
    """
    slots = topk_ids.numel()
    most_tiles = (slots + min(slots, num_experts) * (block_m - 1)) // block_m

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=topk_ids.device)

    order, group_offsets, tiles = integers(slots), integers(num_experts + 1), integers(most_tiles + 1, 3)
    groups = Groups(order, group_offsets, tiles, most_tiles)
    block_e = triton.next_power_of_2(max(num_experts, 16))
    chunks = triton.cdiv(slots, CHUNK)
    blocks = {"BLOCK_M": block_m, "BLOCK_S": BLOCK_S, "BLOCK_E": block_e, "BLOCK_TILES": BLOCK_TILES}
    if chunks == 1:
        chunk = max(BLOCK_S, triton.next_power_of_2(slots))
        group_kernel[(1,)](topk_ids, *groups[:3], slots, num_experts, CHUNK=chunk, **blocks)
        return groups
    counts, sizes = integers(chunks, num_experts), integers(num_experts)
    count_kernel[(chunks,)](topk_ids, counts, slots, num_experts, CHUNK=CHUNK, BLOCK_S=BLOCK_S, BLOCK_E=block_e)
    scan_kernel[(triton.cdiv(num_experts, SCANNED),)](
        counts, sizes, chunks, num_experts, BLOCK_C=BLOCK_C, BLOCK_E=SCANNED
    )
    place_kernel[(chunks,)](topk_ids, counts, sizes, *groups[:3], slots, num_experts, CHUNK=CHUNK, **blocks)
    return groups
