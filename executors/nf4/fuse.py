"""Fuses the gate and the up projection of experts into one, with the same bytes (Q5)."""

from __future__ import annotations

from dataclasses import replace
from math import gcd, prod

import torch

from executors.nf4.convert import check_same, check_tensor, unnest
from moe_ref.types import GateUpLayout, NF4Tensor
from moe_ref.validation.arrays import check_choice
from moe_ref.validation.nf4 import BLOCKSIZES

SAME = ("shape", "dtype", "quant_type", "blocksize", "transposed", "device")
LAYOUTS = ("concatenated", "interleaved")


def fuse(gate: NF4Tensor, up: NF4Tensor, layout: GateUpLayout = "concatenated") -> NF4Tensor:
    """One gate_up_proj (E, 2I, H) from two stacks (E, I, H), which decodes to the same numbers, bit for bit.

    The bytes are joined unchanged, in runs: neighbours in storage that are all of one part. A run is an expert's whole
    matrix if the stacks are stored (E, I, H), and a row of it if the layout is "interleaved"; if they are stored
    (E, H, I) and read transposed, a run has I numbers, or only one in the layout "interleaved". That is exact if a run
    is a multiple of 32 numbers. Where it is no multiple of blocksize, the fused tensor has smaller blocks with the same
    scales. Nested statistics are decoded to fp32 (`unnest`), since the two parts have offsets of their own.

    Args:
        gate: [E, I, H] in NF4 or FP4, with plain or nested statistics in any number of segments.
        up: the same; of gate's shape, dtype, quant_type, blocksize, order of storage and device.
        layout: "concatenated" (all gates, then all ups) or "interleaved" (gate 0, up 0, gate 1, ...), as
            ``MoEConfig.gate_up_layout``.

    Returns:
        The fused tensor with plain statistics, in gate's order of storage.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_choice("layout", layout, LAYOUTS)
    for name, tensor in (("gate", gate), ("up", up)):
        check_tensor(name, tensor)
        if tensor.ndim != 3 or not tensor.size:
            raise ValueError(f"{name}.shape={tensor.shape}: must be (E, I, H), each at least 1")
    check_same("up", up, "gate", gate, SAME)
    runs, numbers = _runs(gate, layout)
    blocksize = gcd(gate.blocksize, numbers)
    if blocksize < BLOCKSIZES[0]:
        allowed = f"must be a multiple of {BLOCKSIZES[0]}, or else blocks would have numbers of both"
        where = f"layout={layout!r} of {gate.shape}, {'transposed' if gate.transposed else 'not transposed'}"
        raise ValueError(f"{where}: gate and up alternate every {numbers} numbers in storage: {allowed}")
    parts = [_in_blocks(unnest(tensor), blocksize) for tensor in (gate, up)]
    packed, absmax = (
        torch.stack([getattr(part, name).reshape(runs, -1) for part in parts], dim=1).reshape(-1)
        for name in ("packed", "absmax")
    )
    experts, rows, width = gate.shape
    return replace(parts[0], packed=packed, absmax=absmax, shape=(experts, 2 * rows, width))


def _runs(part: NF4Tensor, layout: str) -> tuple[int, int]:
    """How many runs a part has in the storage of the fused tensor, and of how many numbers."""
    sizes = (*part.stored_shape, 1)
    first = (2 if part.transposed else 1) + (layout == "interleaved")  # dimension from which on all is of one part
    return prod(sizes[:first]), prod(sizes[first:])


def _in_blocks(tensor: NF4Tensor, blocksize: int) -> NF4Tensor:
    """The same numbers in blocks that are ``tensor.blocksize / blocksize`` times as small; plain statistics."""
    absmax = tensor.absmax.repeat_interleave(tensor.blocksize // blocksize)
    return replace(tensor, absmax=absmax[: -(-tensor.size // blocksize)], blocksize=blocksize)
