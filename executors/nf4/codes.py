"""The numbers of 4-bit codes and of the 8-bit codes of nested statistics, and a comparison of tables."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from executors._decode import table
from moe_ref.types import QuantType

CODES = {quant_type: table.CODES[quant_type] for quant_type in get_args(QuantType)}


def code_table(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """[16] fp32: the numbers of "nf4" or "fp4", by code (Q1)."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def dynamic_code(device: torch.device | str = "cpu") -> Tensor:
    """[256] fp32: the numbers of nested statistics, in increasing order.

    There are seven decades, from the lowest. The n-th has 2**n numbers of each sign: the middles of equal parts of 0.1
    to 1, times its power of ten. 0 is between the signs, 1 at the end. Source: Dettmers 2016 (arXiv:1511.04561). Other
    programs build the table in fp32, so that some entries differ in the last bit. So every tensor carries its own.
    """
    above: list[float] = []
    for decade in range(7):
        parts = 2**decade
        edges = [0.1 + 0.9 * part / parts for part in range(parts + 1)]
        above += [10.0 ** (decade - 6) * (edges[part] + edges[part + 1]) / 2 for part in range(parts)]
    numbers = [-number for number in reversed(above)] + [0.0, *above, 1.0]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two fp32 tensors on one device have the same shape and the same bits; 0 and -0 differ."""
    return first.shape == second.shape and torch.equal(first.view(torch.int32), second.view(torch.int32))
