"""Launches the kernels that bring values between two products from fp32 to fp16, for tensor cores (clause E7)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from executors._triton.kernels.narrow import narrow_columns_kernel, narrow_rows_kernel
from executors._triton.launch.operands import LaunchPlan

ROWS, ROW_COLUMNS = 4, 256  # at a time, of a program that narrows rows
COLUMN_ROWS, COLUMNS = 32, 64  # of one that narrows columns


class Narrow(NamedTuple):
    """An operand of a product.

    Attributes:
        values: [n, k].
        powers: the powers of two by which values were divided, [n] for rows or [E, k] for each expert's columns. None
            if nothing was divided: x is not in fp16, or the values are x or dy.
    """

    values: Tensor
    powers: Tensor | None = None


def between(dtype: torch.dtype) -> torch.dtype:
    """The dtype of values that one kernel leaves to the next (sites of E2): x's, but fp32 for fp16 (E7)."""
    return torch.float32 if dtype == torch.float16 else dtype


def by_rows(values: Tensor, dtype: torch.dtype, plan: LaunchPlan) -> Narrow:
    """Rows [S, n], sorted by expert, for a product along n.

    Args:
        values: in `between`'s dtype.
        dtype: of x.
        plan: of the call.
    """
    if values.dtype == dtype:
        return Narrow(values)
    rows, columns = values.shape
    found = Narrow(torch.empty_like(values, dtype=dtype), values.new_empty(rows))
    narrow_rows_kernel[(triton.cdiv(rows, ROWS),)](
        values,
        plan.groups.group_offsets,
        *found,
        plan.groups.group_offsets.shape[0] - 1,
        columns,
        BLOCK_M=ROWS,
        BLOCK_N=ROW_COLUMNS,
    )
    return found


def by_columns(values: Tensor, dtype: torch.dtype, plan: LaunchPlan, topk_weights: Tensor | None = None) -> Narrow:
    """Rows [S, n], sorted by expert, times the weights of their slots if given, for a product along each expert's rows.

    Args:
        values: in `between`'s dtype.
        dtype: of x.
        plan: of the call.
        topk_weights: [S]; None where the dtypes are the same.
    """
    if values.dtype == dtype:
        assert topk_weights is None
        return Narrow(values)
    columns, experts = values.shape[1], plan.groups.group_offsets.shape[0] - 1
    found = Narrow(torch.empty_like(values, dtype=dtype), values.new_empty(experts, columns))
    narrow_columns_kernel[(triton.cdiv(columns, COLUMNS), experts)](
        values,
        values if topk_weights is None else topk_weights,
        plan.groups.order,
        plan.groups.group_offsets,
        *found,
        columns,
        WEIGHTED=topk_weights is not None,
        BLOCK_M=COLUMN_ROWS,
        BLOCK_N=COLUMNS,
    )
    return found
