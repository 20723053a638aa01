"""Decodes experts before their products, for numbers that many rows use."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from executors._triton.kernels.packed import decode_kernel
from executors._triton.launch.operands import LaunchPlan, Matrices
from executors._triton.launch.packed import codes_of, is_fused
from moe_ref.types import PackedTensor

PARTS = 8  # of the experts: an eighth of a projection is decoded at a time
BLOCK_O, BLOCK_I, WARPS = 128, 64, 4


class Part(NamedTuple):
    """Whose matrices a launch takes: an interval of experts, as the product kernels take it.

    Attributes:
        bounds: [E + 1] where each expert's row tiles begin; any tensor for all experts.
        first, last: the first expert, and the first one after the last; 0 and 0 for all.
    """

    bounds: Tensor
    first: int
    last: int


def parts_of(matrices: Matrices, plan: LaunchPlan) -> Iterator[tuple[Matrices, Part]]:
    """The matrices, part by part. Decoded parts reuse the same memory."""
    if plan.bounds is None or not isinstance(matrices, PackedTensor):
        yield matrices, Part(plan.groups.tiles, 0, 0)
        return
    experts, *stored = matrices.stored_shape
    step = ceil(experts / PARTS)
    room = torch.empty(step, *stored, dtype=getattr(torch, matrices.dtype), device=matrices.device)
    for first in range(0, experts, step):
        last = min(first + step, experts)
        decode(matrices, first, room[: last - first], plan)
        part = room[: last - first]
        yield part.transpose(1, 2) if matrices.transposed else part, Part(plan.bounds, first, last)


def decode(packed: PackedTensor, first: int, out: Tensor, plan: LaunchPlan) -> None:
    """Decodes the experts from ``first`` on that have rows, in the order in which their numbers are stored.

    Args:
        packed: a projection.
        first: the first expert.
        out: [experts, m, k], or [experts, k, m] if it is transposed; written.
        plan: of the call.
    """
    experts, outer, inner = out.shape
    own = codes_of(packed, (BLOCK_I, BLOCK_I), halves=1)
    decode_kernel[(triton.cdiv(inner, BLOCK_I), triton.cdiv(outer, BLOCK_O), experts)](
        own.codes,
        own.scales,
        plan.groups.group_offsets,
        out,
        first,
        outer,
        inner,
        own.strides[:2],
        FORMAT=own.format,
        enable_fp_fusion=is_fused(own.format),
        BLOCK_O=BLOCK_O,
        BLOCK_I=BLOCK_I,
        num_warps=WARPS,
    )
