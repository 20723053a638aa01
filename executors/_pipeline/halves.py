"""The two halves of gated preactivations, gate and up, in at least fp32: taken apart, and put together.

Interleaved halves of bf16 lie in the two halves of a 32-bit word. Shifts take them out and put them in: numbers in
steps of two are read and written slowly on a CPU (docs/performance-log.md). No bit of a number changes.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

INTERLEAVED = "interleaved"
HIGH = -(2**16)  # the upper half of a word


def split(z: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and up [n, I], views of z [n, 2I] in z's dtype."""
    if layout == INTERLEAVED:
        return z[:, 0::2], z[:, 1::2]
    gate, up = z.chunk(2, dim=-1)
    return gate, up


def split_wide(z: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and up [n, I] of z [n, 2I] in at least fp32: views where that is z's dtype."""
    if _in_words(z, layout):
        words = z.view(torch.int32)
        return (words << 16).view(torch.float32), (words & HIGH).view(torch.float32)
    wide = torch.promote_types(z.dtype, torch.float32)
    gate, up = split(z, layout)
    return gate.to(wide), up.to(wide)


def join(z: Tensor, layout: str, gate: Tensor, up: Tensor) -> None:
    """Writes gate and up [n, I] to z [n, 2I], rounded to its dtype."""
    if _in_words(z, layout):
        low, high = (half.to(torch.bfloat16).view(torch.int16).to(torch.int32) for half in (gate, up))
        torch.bitwise_or(low.bitwise_and_(~HIGH), high << 16, out=z.view(torch.int32))
        return
    for whole, half in zip(split(z, layout), (gate, up), strict=True):
        whole.copy_(half)


def _in_words(z: Tensor, layout: str) -> bool:
    """Whether each gate and its up are one word, the gate in its lower half."""
    whole = z.is_contiguous() and z.storage_offset() % 2 == 0
    return layout == INTERLEAVED and z.dtype == torch.bfloat16 and whole and sys.byteorder == "little"
