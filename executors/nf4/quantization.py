"""Quantises numbers to 4 bits, piece by piece, with the bits of clause Q4. Nothing here knows of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor

from executors.nf4.codes import CODES, dynamic_code
from moe_ref.types import NF4Tensor

NESTED_BLOCKSIZE = 256
SMALLEST_ABSMAX = 1e-38  # no block is divided by less
PIECES = {"cpu": 2**21}  # numbers at a time, a multiple of every blocksize; they take about ten times as many bytes
PIECE_ELSEWHERE = 2**24


def quantized(
    name: str,
    values: Tensor,
    *,
    dtype: str,
    quant_type: Any,
    blocksize: int,
    nested: bool,
    done: Callable[[int], object],
) -> NF4Tensor:
    """Quantises numbers in storage order; the arguments are already checked.

    Args:
        name: name of the argument, for the message.
        values: fp32, bf16 or fp16, of any shape and strides.
        dtype: name of the dtype to decode to.
        quant_type: "nf4" or "fp4".
        blocksize: one that the format allows.
        nested: whether absmax is quantised too.
        done: called after each piece with how many numbers of this tensor are quantised.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    stored, transposed = in_storage_order(values)
    size = stored.numel()
    packed = torch.empty(ceil(size / 2), dtype=torch.uint8, device=values.device)
    absmax = torch.empty(ceil(size / blocksize), dtype=torch.float32, device=values.device)
    piece = PIECES.get(values.device.type, PIECE_ELSEWHERE)
    for start in range(0, size, piece):
        stop = min(start + piece, size)
        scaled, largest = scaled_blocks(elements(stored, start, stop), blocksize)
        if not torch.isfinite(largest).all():
            raise ValueError(f"{name} has NaN or infinite elements: must be finite")
        absmax[start // blocksize : ceil(stop / blocksize)] = largest
        packed[start // 2 : ceil(stop / 2)] = packed_codes(scaled, quant_type)[: ceil((stop - start) / 2)]
        done(stop)
    shape = tuple(values.shape)
    tensor = NF4Tensor(
        packed,
        absmax,
        shape=shape,
        dtype=dtype,
        quant_type=quant_type,
        blocksize=blocksize,
        transposed=transposed,
    )
    return with_nested_absmax(tensor) if nested else tensor


def in_storage_order(values: Tensor) -> tuple[Tensor, bool]:
    """The tensor as it is stored, and whether that swaps its last two dimensions."""
    if values.ndim >= 2 and not values.is_contiguous() and values.transpose(-2, -1).is_contiguous():
        return values.transpose(-2, -1), True
    return values, False


def elements(values: Tensor, start: int, stop: int) -> Tensor:
    """[stop - start] of the flattened tensor. If the tensor is not contiguous, only these elements are copied."""
    if values.is_contiguous():
        return values.view(-1)[start:stop]
    if values.ndim == 1:
        return values[start:stop]
    row = values[0].numel()
    first, last = ceil(start / row), stop // row  # the rows that are wanted whole
    if first > last:
        return elements(values[last], start - last * row, stop - last * row)
    parts = [values[first:last].reshape(-1)]
    if start < first * row:
        parts.insert(0, elements(values[first - 1], start - (first - 1) * row, row))
    if last * row < stop:
        parts.append(elements(values[last], 0, stop - last * row))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def scaled_blocks(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """([blocks, blocksize], [blocks]) fp32: numbers divided by the largest magnitude of their block, and these.

    Zeros pad the last block. Numbers that rounding puts beyond -1 or 1 get the codes of -1 or 1.
    """
    filling = -flat.shape[0] % blocksize
    wide = flat.to(torch.float32)
    blocks = (torch.nn.functional.pad(wide, (0, filling)) if filling else wide).reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    factors = 1.0 / absmax.clamp(min=SMALLEST_ABSMAX)
    return blocks * factors[:, None], absmax


def packed_codes(scaled: Tensor, quant_type: str) -> Tensor:
    """The nearest codes of an even number of numbers, two to a byte, the high nibble first.

    A number starts with the code of -1. For each midpoint below the number, the step to the next code is added, modulo
    256; a number on a midpoint is not above it. On a CPU these 15 vectorised comparisons take a third of the time of
    `torch.bucketize`.
    """
    code, steps, midpoints = ladder(quant_type)
    codes = torch.full((scaled.numel(),), code, dtype=torch.uint8, device=scaled.device)
    above = torch.empty_like(codes, dtype=torch.bool)
    flat = scaled.view(-1)
    for step, midpoint in zip(steps, midpoints, strict=True):
        torch.gt(flat, midpoint, out=above)
        codes.add_(above.view(torch.uint8), alpha=step)
    return (codes[0::2] << 4) | codes[1::2]


def ladder(quant_type: str) -> tuple[int, list[int], list[float]]:
    """The lowest number's code, the steps from one number's code to the next (modulo 256), and the midpoints."""
    table = CODES[quant_type]
    numbers = sorted(set(table))
    codes = [table.index(number) for number in numbers]  # the lower of two codes for 0
    rounded = torch.tensor(numbers, dtype=torch.float32)
    midpoints = (rounded[1:] + rounded[:-1]) / 2.0
    return codes[0], [(b - a) % 256 for a, b in pairwise(codes)], midpoints.tolist()


def with_nested_absmax(tensor: NF4Tensor) -> NF4Tensor:
    """Quantises absmax to 8 bits: subtracts its mean (summed in fp64), in blocks of 256, in one segment."""
    absmax: Tensor = tensor.absmax
    offset = (absmax.to(torch.float64).sum() / max(1, absmax.shape[0])).to(torch.float32)
    scaled, nested_absmax = scaled_blocks(absmax - offset, NESTED_BLOCKSIZE)
    code = dynamic_code(absmax.device)
    codes = torch.bucketize(scaled.view(-1)[: absmax.shape[0]], (code[1:] + code[:-1]) / 2.0, out_int32=True)
    return replace(
        tensor,
        absmax=codes.to(torch.uint8),
        nested_absmax=nested_absmax,
        nested_code=code,
        nested_offset=offset,
        nested_blocksize=NESTED_BLOCKSIZE,
    )
