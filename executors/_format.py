"""A projection as arguments of an operator, and back: a dense stack, or 4-bit codes with their scales.

What is static goes as integers: torch.compile may trace them, and text it could not make of them.
"""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from moe_ref.types import NF4Tensor, QuantType
from moe_ref.validation import dtype_name

Parts = tuple[Tensor, list[Tensor], list[int]]  # the stack or the codes, the scales, the format
DENSE = 0
KINDS = get_args(QuantType)  # of 4 bits, numbered from 1


def apart(projection: Any) -> Parts:
    """The arguments that stand for a projection: a Tensor [E, m, k], or an `NF4Tensor` of that shape."""
    if not isinstance(projection, NF4Tensor):
        return projection, [], [DENSE]
    packed, *scales = (array.detach() for array in projection.arrays().values())  # frozen, whatever a module made of it
    kind = 1 + KINDS.index(projection.quant_type)
    static = [kind, projection.blocksize, projection.nested_blocksize, int(projection.transposed)]
    return packed, scales, [*static, *projection.shape]


def packed_of(parts: Parts, x: Tensor) -> NF4Tensor | None:
    """The projection that these arguments stand for, decoded to x's dtype; or None if it is dense."""
    packed, scales, (kind, *static) = parts
    if kind == DENSE:
        return None
    blocksize, nested_blocksize, transposed, *shape = static
    return NF4Tensor(
        packed,
        *scales,
        shape=tuple(shape),
        dtype=dtype_name(x),
        quant_type=KINDS[kind - 1],
        blocksize=blocksize,
        nested_blocksize=nested_blocksize,
        transposed=bool(transposed),
    )
