"""A projection as arguments of an operator, and back: a dense stack, or 4-bit codes with their scales.

What is static goes as integers: torch.compile may trace them, and text it could not make of them.
"""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor, QuantType
from moe_ref.validation import dtype_name

Parts = tuple[Tensor, list[Tensor], list[int]]  # the stack or the codes, the scales, the format
DENSE = 0
KINDS = (*get_args(QuantType), "mxfp4")  # of 4 bits, numbered from 1


def flatten(projection: Any) -> Parts:
    """The arguments that stand for a projection: a Tensor [E, m, k], or a `PackedTensor` of that shape."""
    if not isinstance(projection, PackedTensor):
        return projection, [], [DENSE]
    codes, *scales = (array.detach() for array in projection.arrays().values())  # frozen, whatever a module made of it
    kind = 1 + KINDS.index(projection.quant_type)
    static = [kind, int(projection.transposed)]
    if isinstance(projection, NF4Tensor):
        static += [projection.blocksize, projection.nested_blocksize, *projection.shape]
    return codes, scales, static


def unflatten(parts: Parts, x: Tensor) -> PackedTensor | None:
    """The projection that these arguments stand for, decoded to x's dtype; or None if it is dense."""
    codes, scales, (kind, *static) = parts
    if kind == DENSE:
        return None
    transposed, *static = static
    form: dict[str, Any] = {"dtype": dtype_name(x), "transposed": bool(transposed)}
    if not static:
        return MXFP4Tensor(codes, *scales, **form)
    blocksize, nested_blocksize, *shape = static
    return NF4Tensor(
        codes,
        *scales,
        shape=tuple(shape),
        quant_type=KINDS[kind - 1],
        blocksize=blocksize,
        nested_blocksize=nested_blocksize,
        **form,
    )
