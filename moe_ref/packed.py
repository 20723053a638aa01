"""Decodes 4 bits of any format: `moe_ref.nf4` has clauses Q1 to Q5, `moe_ref.mxfp4` has M1."""

from __future__ import annotations

from moe_ref import mxfp4, nf4
from moe_ref._typing import Array, Float
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor
from moe_ref.validation.arrays import short


def decode(tensor: PackedTensor) -> Array:
    """Decodes all numbers: ``tensor.shape``, in fp32, each representable in ``tensor.dtype``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    if not isinstance(tensor, NF4Tensor | MXFP4Tensor):
        raise TypeError(f"tensor={short(tensor)}: must be a moe_ref.NF4Tensor or a moe_ref.MXFP4Tensor")
    return mxfp4.decode(tensor) if isinstance(tensor, MXFP4Tensor) else nf4.decode(tensor)


def decode_expert(tensor: PackedTensor, index: int) -> Float[Array, "m k"]:
    """Decodes one expert of a projection (E, m, k), as `decode` does, and none of the others."""
    if isinstance(tensor, MXFP4Tensor):
        return mxfp4.decode_expert(tensor, index)
    return nf4.decode_expert(tensor, index)  # type: ignore[arg-type]
