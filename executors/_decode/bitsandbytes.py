"""bitsandbytes' CPU kernel, where it is installed and proved right.

Before a format's first use the kernel decodes a probe, which must have the table's bits (Q6;
`executors._decode.probe`). The kernel always gets one row for each block, never rows that blocks straddle, and blocks
of at most 1024. It never gets scales so small that a bf16 result would be subnormal. docs/known-differences.md says
why.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from executors._decode.probe import is_exact
from moe_ref.types import MoEWeights, MXFP4Tensor, NF4Tensor

NEWS = "bitsandbytes.backends.cpu.ops"  # a logger
LONGEST_BLOCK = 1024  # longer ones take another path in the library
SMALLEST_SCALE = 2.0**-118  # from here on no product with a code is subnormal: the smallest code above 0 is 2**-7.6
BLOCKSIZES = [32, 64, 128, 256, 512, LONGEST_BLOCK]  # of the blocks that the kernel gets


def decode_blocks(codes: Tensor, scales: Tensor, tensor: NF4Tensor) -> Tensor | None:
    """[n] Decodes whole blocks with the kernel; None where the kernel cannot be used.

    Args:
        codes: [n / 2] bytes of whole blocks.
        scales: [n / blocksize] fp32.
        tensor: gives the format.
    """
    if codes.device.type != "cpu" or not codes.shape[0] or not is_right(tensor.quant_type, tensor.dtype):
        return None
    if tensor.dtype == "bfloat16" and not scales.amin().item() >= SMALLEST_SCALE and _any_tiny(scales):
        return None
    return _kernel(codes, scales, tensor.blocksize, tensor.quant_type, getattr(torch, tensor.dtype))


@cache
def is_right(quant_type: str, dtype: str) -> bool:
    """Whether the kernel is installed and decodes a probe to the table's bits."""
    return operator() is not None and is_exact(_kernel, quant_type, dtype, BLOCKSIZES)


@cache
def operator() -> Any:
    """The library's operator, or None where it is not available."""
    logger = logging.getLogger(NEWS)
    logger.addFilter(_is_news)
    try:
        import_module("bitsandbytes")
        return torch.ops.bitsandbytes.dequantize_4bit.default
    except (ImportError, AttributeError, RuntimeError, OSError):  # not there, too old, or broken
        return None
    finally:
        logger.removeFilter(_is_news)


def silence_news() -> None:
    """Keeps the library's message about a fused product from the whole process, whoever imports the library."""
    logging.getLogger(NEWS).addFilter(
        lambda record: _is_news(record)
    )  # a filter of its own: `operator` removes its own


def _is_news(record: logging.LogRecord) -> bool:
    """False for the message that the library found no fused product for CPUs, which nothing here uses."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def slow_note(x: Tensor, weights: MoEWeights) -> str:
    """The reason why a call on a CPU decodes by the table, or ""."""
    if x.device.type != "cpu":
        return ""
    packed = weights.packed()
    tables = [name for name, value in packed.items() if isinstance(value, MXFP4Tensor)]
    if tables:
        return f"bitsandbytes has no MXFP4: decodes {' and '.join(tables)} by a table, several times as slowly"
    if operator() is None:
        return 'decodes several times as fast with bitsandbytes: pip install "moe-ref[nf4]"'
    wrong = [name for name, value in packed.items() if not is_right(value.quant_type, value.dtype)]
    if wrong:
        return f"bitsandbytes' kernel is wrong for {' and '.join(wrong)} on this machine: decodes by a table, slowly"
    return ""


def _kernel(codes: Tensor, scales: Tensor, blocksize: int, quant_type: str, dtype: torch.dtype) -> Tensor:
    parts = max(1, blocksize // LONGEST_BLOCK)
    if parts > 1:
        scales, blocksize = scales.repeat_interleave(parts), LONGEST_BLOCK
    shape = (scales.shape[0], blocksize)
    numbers: Tensor = operator()(codes.contiguous(), scales.contiguous(), blocksize, quant_type, shape, dtype)
    return numbers.view(-1)


def _any_tiny(scales: Tensor) -> bool:
    """Whether a scale of either sign is tiny but not 0: products with 0 are exact."""
    return bool(((scales.abs() < SMALLEST_SCALE) & (scales != 0)).any())
