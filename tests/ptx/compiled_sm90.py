"""The executor of PTX on what sm_90 has beyond sm_80: wgmma, TMA and mbarriers, on small kernels, against torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.faults import KernelFault
from moe_ref.conformance.ptx.fresh import tracked
from moe_ref.conformance.ptx.launch import How, launch
from moe_ref.conformance.ptx.tensor_map import TensorMap
from moe_ref.conformance.ptx.text import Unreadable
from spoiled import places, spoiled


def small(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers, whose sums of products are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@triton.jit
def multiplied(
    a,
    b,
    out,
    M,
    N,
    K,
    a_strides,
    b_strides,
    PRECISION: tl.constexpr,
    HALVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ms = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask_a, mask_b = (ms < M)[:, None] & (ks < K)[None, :], (ks < K)[:, None] & (ns < N)[None, :]
        x = tl.load(a + ms[:, None] * a_strides[0] + ks[None, :] * a_strides[1], mask=mask_a, other=0.0)
        y = tl.load(b + ks[:, None] * b_strides[0] + ns[None, :] * b_strides[1], mask=mask_b, other=0.0)
        if HALVED:  # so that the operand is in registers
            x = (x * 0.5).to(y.dtype)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(out + ms[:, None] * N + ns[None, :], total, mask=(ms < M)[:, None] & (ns < N)[None, :])


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Rows, columns and inner dimension of a tile; warps; stages; dtype; whether a and b are transposed in memory
TILES = [
    (64, 16, 64, 4, 3, BF16, False, False),
    (64, 32, 16, 4, 2, BF16, False, True),  # rows of 32 bytes
    (64, 64, 32, 4, 2, FP16, True, False),  # of 64
    (128, 128, 64, 8, 3, FP16, False, True),
    (128, 256, 64, 8, 2, BF16, True, True),
    (256, 128, 32, 8, 1, BF16, True, False),
    (64, 64, 32, 4, 3, FP32, False, True),
]


def texts(ran: list[str]) -> Callable[[str, str], str]:
    return lambda _, ptx: ran.append(ptx) or ptx


@pytest.mark.parametrize(("m", "n", "k", "warps", "stages", "dtype", "a_across", "b_across"), TILES)
def test_products(
    m: int, n: int, k: int, warps: int, stages: int, dtype: torch.dtype, a_across: bool, b_across: bool
) -> None:
    """Tiles that fit and that do not; operands whose rows or columns are next to each other in memory."""
    rows, inner, columns = 2 * m - 5, 3 * k + 8, n - 3
    a, b = small(rows, inner, dtype=dtype), small(inner, columns, dtype=dtype)
    own_a, own_b = a.T.contiguous().T if a_across else a, b.T.contiguous().T if b_across else b
    ran: list[str] = []
    with executed("sm90") as context:
        context.spoil = texts(ran)
        out = torch.empty(rows, columns)
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        multiplied[(2,)](
            own_a, own_b, out, rows, columns, inner, own_a.stride(), own_b.stride(), "tf32", False, **blocks
        )
    assert torch.equal(out, a.float() @ b.float())
    kind = {BF16: "bf16", FP16: "f16", FP32: "tf32"}[dtype]
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.{kind}", ran[0])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_products_with_an_operand_in_registers(dtype: torch.dtype) -> None:
    a, b = small(64, 96, dtype=dtype), small(96, 64, dtype=dtype)
    ran: list[str] = []
    with executed("sm90") as context:
        context.spoil = texts(ran)
        out = torch.empty(64, 64)
        multiplied[(1,)](a, b, out, 64, 64, 96, a.stride(), b.stride(), "ieee", True, 64, 64, 32, num_stages=2)
    assert torch.equal(out, (a / 2).float() @ b.float())
    assert re.search(r"wgmma\.mma_async[^{]*\{[^}]*\}, \{", ran[0])


def test_products_add_in_fp32_and_cut_off_tf32() -> None:
    """Not whole numbers: near to fp64, and 13 bits of an operand are not read."""
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    with executed("sm90"):
        out, low = torch.empty(64, 64), torch.empty(64, 64)
        for target, x in ((out, a), (low, (a.view(torch.int32) & -0x2000 | 0x1ABC).view(FP32))):
            multiplied[(1,)](x, b, target, 64, 64, 64, a.stride(), b.stride(), "tf32", False, 64, 64, 32)
    cut_a, cut_b = ((o.view(torch.int32) & -0x2000).view(FP32).double() for o in (a, b))
    torch.testing.assert_close(out.double(), cut_a @ cut_b, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, low)


@triton.jit
def boxes(source, out, first, second, third, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if DEPTH:
        values = source.load([third, first, second]).reshape(ROWS, COLUMNS)
    else:
        values = source.load([first, second])
    tl.store(out + place, values)


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.int8])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (-3, -8), (5, 16), (40, 8), (0, 200)])
@pytest.mark.parametrize(("columns", "width"), [(16, 21), (32, 48), (64, 33), (128, 99)])
def test_boxes_are_zeros_outside(dtype: torch.dtype, columns: int, width: int, first: int, second: int) -> None:
    """Boxes of each swizzle, within a tensor, over each of its ends and beyond it, in two and three dimensions."""
    whole = small(3, 37, 128, dtype=dtype)
    part = whole[:, :, :width]
    padded = torch.zeros(3, 37 + 80, 512, dtype=dtype)
    padded[:, 40:77, 64 : 64 + width] = part
    expected = padded[:, 40 + first : 72 + first, 64 + second : 64 + second + columns]
    with executed("sm90") as context:
        ran: list[str] = []
        context.spoil = texts(ran)
        for depth in (0, 1):
            out = torch.empty(32, columns, dtype=dtype)
            if depth:
                source = TensorDescriptor(part, [3, 37, width], list(part.stride()), [1, 32, columns])
            else:
                source = TensorDescriptor(part[2], [37, width], list(part.stride())[1:], [32, columns])
            boxes[(1,)](source, out, first, second, 2, ROWS=32, COLUMNS=columns, DEPTH=depth)
            assert torch.equal(out, expected[2])
    assert all(re.search(rf"cp\.async\.bulk\.tensor\.{n}d", ptx) for n, ptx in zip((2, 3), ran, strict=True))


@triton.jit
def multiplied_boxes(
    a, b, out, K, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, TURNED: tl.constexpr
):
    row = tl.program_id(0) * ROWS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, BLOCK_K):
        y = b.load([0, k]).T if TURNED else b.load([k, 0])
        total = tl.dot(a.load([row, k]), y, total)
    ms, ns = row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out + ms[:, None] * N + ns[None, :], total, mask=(ns < N)[None, :])


def multiply_boxes(steps: int = 6, turned: bool = False, rows: int = 64) -> None:
    a, b = small(2 * rows, 64 * steps - 9, dtype=BF16), small(64 * steps - 9, 120, dtype=BF16)
    given = torch.zeros(2 * rows, 64 * steps, dtype=BF16)[:, : 64 * steps - 9]
    given.copy_(a)
    other = torch.zeros(120, 64 * steps, dtype=BF16)[:, : 64 * steps - 9].T if turned else b.clone()
    other.copy_(b)
    stored = other.T if turned else other
    out = torch.empty(2 * rows, 120)
    multiplied_boxes[(2,)](
        TensorDescriptor(given, list(given.shape), list(given.stride()), [rows, 64]),
        TensorDescriptor(stored, list(stored.shape), list(stored.stride()), [128, 64] if turned else [64, 128]),
        out,
        a.shape[1],
        120,
        ROWS=rows,
        COLUMNS=128,
        BLOCK_K=64,
        TURNED=turned,
        num_stages=3,
    )
    assert torch.equal(out, a.float() @ b.float())


@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("how", [How(), How(reverse=True, together=1)])
def test_pipelined_boxes(how: How, turned: bool, rows: int) -> None:
    """Loops that load ahead, with more and with fewer steps than stages; 16 rows take mma of a warp."""
    for steps in (1, 2, 7):
        with executed("sm90", how) as context:
            ran: list[str] = []
            context.spoil = texts(ran)
            multiply_boxes(steps, turned, rows)
    assert ("wgmma" in ran[0]) == (rows >= 64)


# How each may be spoiled, and which reports say so.
SPOILED = {
    "landing": "that a cp.async in flight writes|ends before it has landed|that a copy in flight",
    "bytes": "waits for an mbarrier that never completes",
    "issue": "waits for an mbarrier that never completes",
    "products waited for": "touches a register of a wgmma in flight|a wgmma in flight reads",
    "products committed": "touches a register of a wgmma in flight|a wgmma in flight reads",
    "products fenced": "no wgmma.fence since",
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_boxes_are_reported(kind: str) -> None:
    ran: list[str] = []
    with executed("sm90") as context:
        context.spoil = texts(ran)
        multiply_boxes()
        found = places(ran[0], kind)
        assert found
        for place in found:
            context.spoil = lambda _, ptx, place=place: spoiled(ptx, kind, place)
            with pytest.raises(KernelFault, match=SPOILED[kind]):
                multiply_boxes()
