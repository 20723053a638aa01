"""Tests, before a format's first use, whether a kernel decodes 4 bits as the table does, to the last bit.

The probe has what kernels got wrong, or could get wrong: every code at every position of a block, in a vector or in a
remainder; every length of a block; one block, a few, and many; scales of both signs, ties of the rounding, products
that only two roundings get right, zeros of both signs, subnormal and too large numbers, infinity and NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import torch
from torch import Tensor

from executors._decode.table import decode_codes, table_of

BLOCKS = 256  # so that every byte is at every position
COUNTS = (1, 3, BLOCKS)
STEP = 37  # from one byte to the next; odd, so that a block has many different bytes
TIES = (1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11)  # of ±1, rounded to bf16, and to fp16
TWO_ROUNDINGS = {  # a product of these and a code, rounded to fp32, is a tie of bf16 or fp16; the exact one is not
    "nf4": tuple(map(float.fromhex, ("0x1.00d0eap+0", "0x1.0020fep+0"))),
    "fp4": tuple(map(float.fromhex, ("0x1.02c0p+0", "0x1.0038p+0"))),
}
POWERS = {"float32": (-140, 126), "bfloat16": (-118, 126), "float16": (-28, 18)}
EXTREMES = {"float32": 2.0**-149, "bfloat16": 2.0**-118, "float16": 2.0**-149}

Kernel = Callable[[Tensor, Tensor, int, str, torch.dtype], Tensor]  # codes, scales, blocksize, quant_type, dtype


def is_exact(kernel: Kernel, quant_type: str, dtype: str, blocksizes: list[int]) -> bool:
    """Whether the kernel and the table give the same bits. The sign of a zero counts; all NaN are equal.

    Args:
        kernel: decodes [n / 2] bytes with [n / blocksize] scales to [n] numbers.
        quant_type: "nf4" or "fp4".
        dtype: dtype of the numbers.
        blocksizes: all that the kernel may get.
    """
    table, scales = table_of(quant_type, "cpu"), probe_scales(quant_type, dtype)
    for blocksize in blocksizes:
        places = torch.arange(blocksize // 2) * STEP
        codes = (torch.arange(BLOCKS)[:, None] + places).to(torch.uint8).view(-1)
        right = torch.empty(BLOCKS * blocksize, dtype=getattr(torch, dtype))
        decode_codes(codes, scales, blocksize, table, right)
        for count in COUNTS:
            given = codes[: count * blocksize // 2], scales[:count]
            if not _same_bits(kernel(*given, blocksize, quant_type, right.dtype), right[: count * blocksize]):
                return False
    return True


def probe_scales(quant_type: str, dtype: str) -> Tensor:
    """[256] fp32. The first few are ordinary: the probe also decodes these alone."""
    low, high = POWERS[dtype]
    parts = [1.0, 1.37, *TIES, *TWO_ROUNDINGS[quant_type]]
    powers = [round(low + (high - low) * step / 14) for step in range(15)]
    products = [sign * part * 2.0**power for power in powers for part in parts for sign in (1, -1)]
    tiny, huge = EXTREMES[dtype], torch.finfo(torch.float32).max
    extremes = [-1.37, 1.0, 3.7, 0.0, -0.0, tiny, -tiny, huge, -huge, 1e38, -1e38, inf, -inf, nan, 65519.9, 65520.0]
    return torch.tensor([*extremes, *products], dtype=torch.float32)


def _same_bits(found: Tensor, right: Tensor) -> bool:
    if found.dtype != right.dtype or found.shape != right.shape:
        return False
    kind = torch.int32 if right.dtype == torch.float32 else torch.int16
    return bool(((found.view(kind) == right.view(kind)) | (found.isnan() & right.isnan())).all())
