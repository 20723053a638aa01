"""Products of fp16 on a GPU whose results may pass its range (clause E7).

What stands between products is fp32. To be multiplied it is brought into the range of fp16 by powers of two, a row of
the left operand and a column of the right one at a time: those scales stand outside of the sums, and are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float16).max
FITTING = 15  # a row past it is brought below 2**15


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` = a b.

    Args:
        a: [n, k], fp16 or fp32.
        b: [k, m], fp16 or fp32.
        out: [n, m], written; fp32, or fp16 where results are known to fit.
    """
    (a, of_rows), (b, of_columns) = _fitted(a, 1), _fitted(b, 0)
    product = _product(a, b)
    for scale in (of_rows, of_columns):
        product = product if scale is None else product.mul_(scale)
    out.copy_(product)


def _fitted(value: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """The value in fp16, divided by powers of two along ``dim`` where it would not fit, and these powers."""
    if value.dtype == torch.float16:
        return value, None
    largest = value.abs().amax(dim, keepdim=True)
    excess = (torch.frexp(largest).exponent - FITTING).masked_fill_((largest <= LARGEST) | ~largest.isfinite(), 0)
    scale = torch.ldexp(torch.ones_like(largest), excess)
    return (value / scale).to(torch.float16), scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
