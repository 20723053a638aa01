"""Quantises numbers to MXFP4, piece by piece, with the bits of clause M1. Nothing here knows of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ref.types import MXFP4Tensor

BLOCKSIZE = 32
LARGEST_EXPONENT = 2  # of a code: 6 is 1.5 * 2**2
BIAS, LARGEST_SCALE = 127, 254
# Where codes 1 to 7 begin: codes with an even mantissa at the midpoint itself (True), the others beyond it.
MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
PIECES = {"cpu": 2**20}  # numbers at a time; they take about fifteen times as many bytes
PIECE_ELSEWHERE = 2**24


def quantized(name: str, values: Tensor, dtype: Any) -> MXFP4Tensor:
    """Quantises numbers in blocks along their last dimension; the arguments are already checked.

    Args:
        name: name of the argument, for the message.
        values: fp32, bf16 or fp16, of any strides.
        dtype: name of the dtype to decode to.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    *rows, width = values.shape
    groups = width // BLOCKSIZE
    blocks = torch.empty(*rows, groups, BLOCKSIZE // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(*rows, groups, dtype=torch.uint8, device=values.device)
    if values.numel():
        _fill(name, values, blocks, scales)
    return MXFP4Tensor(blocks, scales, dtype=dtype)


def _fill(name: str, values: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """Writes blocks and scales, one piece of rows at a time; with more dimensions, one index of the first at a time."""
    if values.ndim > 2:
        for parts in zip(values, blocks, scales, strict=True):
            _fill(name, *parts)
        return
    if values.ndim == 1:
        values, blocks, scales = values[None], blocks[None], scales[None]
    step = max(1, PIECES.get(values.device.type, PIECE_ELSEWHERE) // values.shape[1])
    for start in range(0, values.shape[0], step):
        places = slice(start, start + step)
        blocks[places], scales[places] = _codes(name, values[places])


def _codes(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises numbers [n, k] to blocks [n, k / 32, 16] and scales [n, k / 32]."""
    groups = values.to(torch.float32).reshape(values.shape[0], -1, BLOCKSIZE)
    largest = groups.abs().amax(dim=-1)
    if not torch.isfinite(largest).all():
        raise ValueError(f"{name} has NaN or infinite elements: must be finite")
    exponents = torch.frexp(largest).exponent  # largest = m * 2**exponent with 0.5 <= m < 1
    scales = (exponents - 1 - LARGEST_EXPONENT + BIAS).clamp_(0, LARGEST_SCALE).masked_fill_(largest == 0, 0)
    inverse = ((2 * BIAS - scales) << 23).view(torch.float32)  # 2**(127 - scale): no scale reaches 254
    magnitudes = groups.abs() * inverse[..., None]  # exact, except subnormal numbers far below the first midpoint
    codes = (groups < 0).to(torch.uint8) << 3
    for midpoint, to_upper in MIDPOINTS:
        codes += magnitudes >= midpoint if to_upper else magnitudes > midpoint
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales.to(torch.uint8)
