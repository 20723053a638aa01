"""Layers whose two projections are of different kinds, misread."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from moe_ref import mxfp4, nf4
from moe_ref.conformance.mutants._registry import MXFP4, NF4, packed_mutant
from moe_ref.conformance.wrapped import experts
from moe_ref.packed import decode
from moe_ref.types import PROJECTIONS, MoEWeights, NF4Tensor, PackedTensor
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Executor


def _dense_beside(weights: MoEWeights) -> dict[str, Tensor]:
    """The dense projection of a layer that has another one in 4 bits, by name."""
    dense = {name: getattr(weights, name) for name in PROJECTIONS if name not in weights.packed()}
    return dense if weights.packed() else {}


@packed_mutant(*NF4, *MXFP4, mixed=True)
def dense_gradient_beside_4_bits_missing(
    inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights
) -> Tensor:
    """A dense projection is frozen because the other one is in 4 bits (D1)."""
    frozen = {name: value.detach() for name, value in _dense_beside(weights).items()}
    return experts(inner, x, ids, w, weights.with_parameters(frozen))


@packed_mutant(*NF4, *MXFP4, mixed=True)
def dense_beside_4_bits_rounded(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A dense projection is rounded to the 4 bits of the other one; its gradient is right (E2)."""

    def rounded(value: Tensor, other: PackedTensor) -> Tensor:
        stored, name = value.detach().float().contiguous(), dtype_name(value)
        in_nf4 = isinstance(other, NF4Tensor)
        codes = nf4.quantize(stored, dtype=name) if in_nf4 else mxfp4.quantize(stored, dtype=name)
        return value + (decode(codes).to(value.dtype) - value).detach()

    (other, *_), dense = [*weights.packed().values(), None], _dense_beside(weights)
    wrong = {name: rounded(value, other) for name, value in dense.items() if other is not None}
    return experts(inner, x, ids, w, weights.with_parameters(wrong))


@packed_mutant(*NF4, mixed=True)
def table_of_gate_up_proj_for_both(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The codes of down_proj are looked up in the table of gate_up_proj (Q1)."""
    up, down = weights.gate_up_proj, weights.down_proj
    if isinstance(up, NF4Tensor) and isinstance(down, NF4Tensor):
        weights = replace(weights, down_proj=replace(down, quant_type=up.quant_type))
    return experts(inner, x, ids, w, weights)
