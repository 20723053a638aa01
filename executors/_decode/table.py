"""Decodes 4-bit codes by a table of each byte's two numbers, correctly on every device."""

from __future__ import annotations

import torch
from torch import Tensor

CODES = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)),
    "mxfp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}
LOW_FIRST = ("mxfp4",)  # the low nibble is the first number
PIECES = {"cpu": 2**19}  # bytes decoded at a time: twelve times that fit in a cache
PIECE = 2**23  # on a GPU: few launches, 100 MB of memory


def table_of(quant_type: str, device: torch.device | str) -> Tensor:
    """[256, 2] fp32: the two numbers of each byte, in order (Q1, M1)."""
    numbers = CODES[quant_type]
    if torch.device(device).type == "cpu":
        codes = torch.tensor(numbers, dtype=torch.float32)
    else:  # made on the device: a copy from the host would wait for the device
        codes = torch.cat([torch.full((1,), number, dtype=torch.float32, device=device) for number in numbers])
    pair = [codes.repeat_interleave(16), codes.repeat(16)]  # of the high nibble, and of the low one
    return torch.stack(pair[::-1] if quant_type in LOW_FIRST else pair, dim=1)


def decode_codes(codes: Tensor, scales: Tensor, blocksize: int, table: Tensor, out: Tensor) -> None:
    """Decodes blocks; the last may end early.

    Each number is one product in fp32, then rounded once to ``out``'s dtype (Q2).

    Args:
        codes: [n] bytes.
        scales: [ceil(2 n / blocksize)] fp32.
        blocksize: codes per block.
        table: from `table_of`.
        out: [2 n], or one less if the last code is padding; written.
    """
    pairs = table.view(torch.int64).view(-1)  # gathers one word for each byte
    step = PIECES.get(codes.device.type, PIECE)  # whole blocks: these sizes are powers of two
    for start in range(0, codes.shape[0], step):
        numbers = pairs.index_select(0, codes[start : start + step].int()).view(torch.float32)
        first, whole = 2 * start // blocksize, numbers.shape[0] // blocksize
        blocks = numbers[: whole * blocksize].view(whole, blocksize)
        blocks.mul_(scales[first : first + whole, None])
        numbers[whole * blocksize :].mul_(scales[first + whole : first + whole + 1])
        places = slice(2 * start, min(2 * start + numbers.shape[0], out.shape[0]))
        out[places] = numbers[: places.stop - places.start]


def decode_elements(packed: Tensor, scales: Tensor, places: Tensor, table: Tensor, out: Tensor) -> None:
    """Decodes numbers one by one, at any positions, for experts that share blocks.

    Args:
        packed: [bytes], all bytes of the tensor.
        scales: [n] fp32, the scale of each number's block.
        places: [n] positions of the numbers in the tensor.
        table: from `table_of`.
        out: [n], written.
    """
    low = places % 2
    codes = packed.index_select(0, places // 2).int()
    out.copy_(table.view(-1).index_select(0, 2 * codes + low.int()) * scales)
