"""The product of rows with one expert's matrix on a CPU, fast whatever the processor.

A processor with matrix instructions of 16 bits multiplies by torch's own product. Others multiply in fp32: the matrix
is widened, which is exact, slice by slice into memory that stays in the cache; sums are fp32, and each result is
rounded once (E2). torch's 16-bit products go by plain loops there, up to a hundred times as slow. The exception is a
few rows against a matrix whose rows lie in one piece: then torch's product reads half the bytes, and is faster.

The choice depends on dtypes, sizes, strides and the processor, never on timing or on the number of threads.
"""

from __future__ import annotations

from functools import cache
from platform import machine

import torch
from torch import Tensor

from moe_ref.validation import dtype_name

NARROW = (torch.bfloat16, torch.float16)
X86 = ("x86_64", "amd64")
FEW_ROWS = 5  # up to so many rows are multiplied as they are (docs/performance-results.md)
FEW_COLUMNS = 16  # of a product in fp32 that is turned: those of an adapter (docs/performance-log.md)
TURNED = 32  # rows, and numbers in a sum, from which on that pays
SLICE = 2**18  # numbers of a matrix that are widened at a time: 1 MiB
TILE = 32  # numbers of bf16 in a row of AMX' tiles
ALIGNED = 64  # columns of which a slice has a multiple, if it can


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions that multiply matrices of ``dtype``, and torch uses them.

    torch and oneDNN also say so of bf16 on processors with AVX-512 that lack them, where products are emulated.
    """
    if dtype not in NARROW:
        return True
    if not _has_onednn():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    emulated = machine().lower() in X86 and not torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated


def keeps_rows_apart(dtype: torch.dtype, count: int) -> bool:
    """Whether torch's own product sums ``count`` numbers of each row and nothing else.

    With AMX oneDNN reads on into the next row where a row of bf16 is no whole tile, and multiplies that by zeros: a NaN
    there would come through (R4).
    """
    return dtype != torch.bfloat16 or count % TILE == 0 or not _has_amx()


def note(x: Tensor) -> str:
    """Which products a call with x on a CPU takes, in one line; "" for other devices, and for fp32 and fp64."""
    if x.device.type != "cpu" or x.dtype not in NARROW:
        return ""
    name = dtype_name(x)
    if multiplies(x.dtype):
        return f"products in {name}: this CPU has instructions for them"
    return f"products in fp32, of more than {FEW_ROWS} rows of an expert: this CPU has no instructions for {name}"


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` = a b.

    Args:
        a: [n, k] of b's dtype, or fp32 beside fp16.
        b: [k, m], any strides.
        out: [n, m], written; a's dtype, or fp32 beside fp16, whose results may pass its range (E7).
    """
    if b.dtype not in NARROW:
        _multiply_wide(a, b, out)
    elif not (is_narrow(a.shape[0], b) and _multiply_narrow(a, b, out)):
        _multiply_widened(a.float().contiguous(), b, out)


def multiply_outer(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` = aᵀ b, the sum over rows of outer products.

    Args:
        a: [n, m].
        b: [n, k]; of a's dtype, but one may be fp32 where the other is fp16.
        out: [m, k], written; of any dtype.
    """
    if out.stride(0) < out.stride(1):  # stored by columns
        a, b, out = b, a, out.t()
    if a.dtype == b.dtype == out.dtype and out.dtype not in NARROW:
        _multiply_wide(a.t(), b, out)
    elif a.dtype == b.dtype == out.dtype and multiplies(out.dtype):
        torch.mm(a.t(), b, out=out)
    elif a.shape[0] == 1:  # a single product for each number
        torch.mul(a.float().t(), b.float(), out=out)
    else:
        _multiply_outer_widened(a, b, out)


def _multiply_wide(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` = a b in fp32 or fp64: with few columns as bᵀ aᵀ, which MKL multiplies up to six times as fast."""
    if out.shape[1] <= FEW_COLUMNS and min(a.shape) >= TURNED:
        out.copy_(torch.mm(b.t(), a.t()).t())
    else:
        torch.mm(a, b, out=out)


def is_narrow(count: int, b: Tensor) -> bool:
    """Whether ``count`` rows are multiplied with b [k, m] in b's own 16 bits."""
    if multiplies(b.dtype):
        return keeps_rows_apart(b.dtype, b.shape[0])
    return count <= FEW_ROWS and b.stride(0) == 1


def _multiply_narrow(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """The product in 16 bits, and whether it could be had: of fp16 only where all of it is finite (E7)."""
    if b.dtype == torch.bfloat16:
        torch.mm(a, b, out=out)
        return True
    product = torch.mm(a.to(b.dtype), b)
    if not product.isfinite().all():
        return False
    out.copy_(product)
    return True


def _multiply_widened(a: Tensor, b: Tensor, out: Tensor) -> None:
    """The product in fp32 of a [n, k], in fp32, and b [k, m], widened in slices of its columns."""
    count, columns = b.shape
    step = max(1, SLICE // max(1, count))
    step = min(columns, step - step % ALIGNED or step)
    turned = b.stride(0) == 1  # each column of b is in one piece: slices are the left operand
    room = a.new_empty(step * count)
    found = []
    for start in range(0, columns, step):
        part = b[:, start : start + step]
        own = room[: part.numel()]  # in one piece too: oneDNN is slow where rows have gaps between them
        if turned:
            found.append(_multiply_fp32(own.view(-1, count).copy_(part.t()), a))
        else:
            found.append(_multiply_fp32(a, own.view(count, -1).copy_(part).t()))
    out.copy_(torch.cat(found).t() if turned else torch.cat(found, dim=1))


def _multiply_outer_widened(a: Tensor, b: Tensor, out: Tensor) -> None:
    """aᵀ b in fp32, in slices of rows of the result."""
    columns, rows = a.t().float().contiguous(), b.t().float().contiguous()
    step = max(1, SLICE // rows.shape[0])
    for start in range(0, columns.shape[0], step):
        out[start : start + step] = _multiply_fp32(columns[start : start + step], rows)


def _multiply_fp32(a: Tensor, b: Tensor) -> Tensor:
    """[n, m]: a [n, k] times b [m, k] transposed, in fp32.

    By oneDNN, whose sums do not depend on the number of threads for two rows or more; those of torch.mm do.
    """
    if not _has_onednn():
        return torch.mm(a, b.t())
    rows = a if a.shape[0] > 1 else a.expand(2, -1).contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, b, None, "none", [], "")
    return product[: a.shape[0]]


def _has_amx() -> bool:
    return machine().lower() in X86 and torch.cpu._is_amx_tile_supported()


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
