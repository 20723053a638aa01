"""MXFP4 misread: codes, and the exponents of blocks (M1). Mutants of several formats are in packed.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import MXFP4, packed_mutant
from moe_ref.conformance.mutants.packed import changed
from moe_ref.conformance.wrapped import experts
from moe_ref.types import MoEWeights, MXFP4Tensor

if TYPE_CHECKING:
    from executors import Executor

TWOS_COMPLEMENT = (*range(8), 15, *range(15, 8, -1))  # codes from 8 on as 16 - code, negated; -8 has no code


def _with_scales(weights: MoEWeights, change: Callable[[Tensor], Tensor]) -> MoEWeights:
    def wrong(tensor: MXFP4Tensor) -> MXFP4Tensor:
        return replace(tensor, scales=change(tensor.scales).contiguous())

    return changed(weights, wrong, MXFP4Tensor)


def _with_blocks(weights: MoEWeights, change: Callable[[Tensor, Tensor], Tensor]) -> MoEWeights:
    def wrong(tensor: MXFP4Tensor) -> MXFP4Tensor:
        return replace(tensor, blocks=change(tensor.blocks, tensor.scales))

    return changed(weights, wrong, MXFP4Tensor)


@packed_mutant(*MXFP4)
def exponent_bias_128(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The bias of exponents is read as half of 256 (M1)."""
    return experts(inner, x, ids, w, _with_scales(weights, lambda scales: scales.clamp(min=1) - 1))


@packed_mutant(*MXFP4)
def exponents_in_7_bits(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Exponents from 128 on lose their first bit (M1)."""
    return experts(inner, x, ids, w, _with_scales(weights, lambda scales: scales & 127))


@packed_mutant(*MXFP4)
def exponent_0_is_zero(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Exponent 0, shifted into the exponent field of fp32, gives 0 and not 2**-127 (M1)."""
    wrong = _with_blocks(weights, lambda blocks, scales: torch.where(scales[..., None] == 0, 0, blocks).byte())
    return experts(inner, x, ids, w, wrong)


@packed_mutant(*MXFP4)
def scale_of_next_block(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each block has the scale of the next (M1)."""
    wrong = _with_scales(weights, lambda scales: scales.flatten().roll(-1).view(scales.shape))
    return experts(inner, x, ids, w, wrong)


@packed_mutant(*MXFP4)
def scales_of_neighbouring_row(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each row has the scales of the one before (M1)."""
    return experts(inner, x, ids, w, _with_scales(weights, lambda scales: scales.roll(1, dims=1)))


@packed_mutant(*MXFP4)
def scales_read_column_by_column(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Scales (E, m, k / 32) are read as if rows were contiguous, as some kernels expect (M1)."""
    wrong = _with_scales(weights, lambda scales: scales.mT.reshape(scales.shape))
    return experts(inner, x, ids, w, wrong)


@packed_mutant(*MXFP4)
def scales_of_first_expert(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """All experts have the scales of the first (M1)."""
    return experts(inner, x, ids, w, _with_scales(weights, lambda scales: scales[:1].expand_as(scales)))


@packed_mutant(*MXFP4)
def codes_in_twos_complement(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Codes are read as two's complement instead of sign and magnitude (M1)."""

    def wrong(blocks: Tensor, _: Tensor) -> Tensor:
        table = torch.tensor(TWOS_COMPLEMENT, dtype=torch.uint8, device=blocks.device)
        return (table[(blocks >> 4).int()] << 4) | table[(blocks & 15).int()]

    return experts(inner, x, ids, w, _with_blocks(weights, wrong))
