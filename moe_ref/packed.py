"""Numbers in 4 bits, of whatever format: clauses Q1 to Q5 by `moe_ref.nf4`, M1 by `moe_ref.mxfp4`."""

from __future__ import annotations

from moe_ref import mxfp4, nf4
from moe_ref._typing import Array, Float
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor
from moe_ref.validation.arrays import short


def decode(tensor: PackedTensor) -> Array:
    """All numbers, of ``tensor.shape``: in fp32, each one a number of ``tensor.dtype``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    if not isinstance(tensor, NF4Tensor | MXFP4Tensor):
        raise TypeError(f"tensor={short(tensor)}: must be a moe_ref.NF4Tensor or a moe_ref.MXFP4Tensor")
    return mxfp4.decode(tensor) if isinstance(tensor, MXFP4Tensor) else nf4.decode(tensor)


def decode_expert(tensor: PackedTensor, index: int) -> Float[Array, "m k"]:
    """One expert of a projection (E, m, k), as `decode` gives it, without decoding the others."""
    if isinstance(tensor, MXFP4Tensor):
        return mxfp4.decode_expert(tensor, index)
    return nf4.decode_expert(tensor, index)  # type: ignore[arg-type]
