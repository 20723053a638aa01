"""The executor of PTX on what sm_90 has beyond sm_80: wgmma, TMA and mbarriers, on small kernels, against torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from executing import LACKS_FENCE, fenced
from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.faults import KernelFault
from moe_ref.conformance.ptx.launch import How
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


@fenced
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


@fenced
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


@fenced
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


@triton.jit(do_not_specialize=["first", "second", "third"])
def boxes(source, out, first, second, third, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = source.load([third, first, second]) if DEPTH else source.load([first, second])
    tl.store(out + place, values.reshape(ROWS, COLUMNS))


# Columns of a box of each swizzle, the last in two copies; columns of the tensor.
BOXES = [("sm80", BF16, 16, 21), ("sm90", BF16, 8, 12), ("sm90", BF16, 16, 21), ("sm90", BF16, 32, 48)]
BOXES += [("sm90", BF16, 64, 33), ("sm90", BF16, 128, 99), ("sm90", FP32, 32, 33), ("sm90", torch.int8, 64, 99)]


@pytest.mark.parametrize(("target", "dtype", "columns", "width"), BOXES)
def test_boxes_are_zeros_outside(target: str, dtype: torch.dtype, columns: int, width: int) -> None:
    """Boxes within a tensor, over each of its ends and beyond it, in two and three dimensions; sm80 has no TMA."""
    whole = small(3, 37, 128, dtype=dtype)
    part = whole[:, :, :width]
    padded = torch.zeros(3, 37 + 80, 512, dtype=dtype)
    padded[:, 40:77, 64 : 64 + width] = part
    flat = TensorDescriptor(part[2], [37, width], list(part.stride())[1:], [32, columns])
    deep = TensorDescriptor(part, [3, 37, width], list(part.stride()), [1, 32, columns])
    ran: list[str] = []
    with executed(target) as context:
        context.spoil = texts(ran)
        for first, second in ((0, 0), (-3, -8), (5, 16), (40, 8), (0, 200)):
            expected = padded[:, 40 + first : 72 + first, 64 + second : 64 + second + columns]
            for source in (flat, deep):
                out = torch.empty(32, columns, dtype=dtype)
                boxes[(1,)](source, out, first, second, 2, ROWS=32, COLUMNS=columns, DEPTH=source is deep)
                assert torch.equal(out, expected[2])
    for number, ptx in zip((2, 3), ran, strict=False):
        assert (f"cp.async.bulk.tensor.{number}d" in ptx) == (target == "sm90")


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
def test_pipelined_boxes(turned: bool, rows: int) -> None:
    """Loops that load ahead, with more and with fewer steps than stages; 16 rows take mma of a warp."""
    for steps, how in ((1, How()), (2, How(together=1)), (7, How(reverse=True))):
        with executed("sm90", how) as context:
            ran: list[str] = []
            context.spoil = texts(ran)
            multiply_boxes(steps, turned, rows)
    assert ("wgmma" in ran[0]) == (rows >= 64)


def multiply(steps: int = 5) -> None:
    """Loads by pointers, through cp.async."""
    a, b = small(64, 32 * steps, dtype=BF16), small(32 * steps, 64, dtype=BF16)
    out = torch.empty(64, 64)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_stages": 3}
    multiplied[(1,)](a, b, out, 64, 64, a.shape[1], a.stride(), b.stride(), "ieee", False, **blocks)
    assert torch.equal(out, a.float() @ b.float())


NO_FENCE = "no fence.proxy.async between it and what threads {} there"
# How many spoiled texts may go unnoticed: barriers between copies by TMA into different places, and that before the
# first cp.async.
SPOILED: list[tuple[Callable[[], None], str, int, str]] = [
    (multiply_boxes, "landing", 0, "reads shared memory that a copy in flight writes"),
    (multiply_boxes, "bytes", 0, "waits for an mbarrier that never completes"),
    (multiply_boxes, "issue", 0, "waits for an mbarrier that never completes"),
    (multiply_boxes, "products waited for", 0, "touches a register of a wgmma in flight|a wgmma in flight reads"),
    (multiply_boxes, "products committed", 0, "a wgmma in flight reads"),
    (multiply_boxes, "products fenced", 0, "no wgmma.fence since its registers were touched"),
    (multiply_boxes, "barrier", 8, "race"),
    (partial(multiply_boxes, rows=16), "proxies fenced", 0, NO_FENCE.format("read")),
    (partial(multiply_boxes, rows=16), "landing", 0, "reads shared memory that a cp.async in flight writes"),
    (multiply, "proxies fenced", 0, NO_FENCE.format("wrote")),
    (multiply, "products waited for", 0, "writes shared memory that a wgmma in flight reads"),
    (multiply, "products fenced", 0, "no wgmma.fence since its registers were touched"),
    (multiply, "barrier", 1, "race"),
    (multiply, "wait", 0, "a copy in flight|a cp.async in flight"),
]


@fenced
@pytest.mark.parametrize(("run", "kind", "unnoticed", "what"), SPOILED)
def test_spoiled_text_is_reported(run: Callable[[], None], kind: str, unnoticed: int, what: str) -> None:
    ran: list[str] = []
    with executed("sm90") as context:
        context.spoil = texts(ran)
        run()
        found, reports = places(ran[0], kind), []
        assert found
        for place in found:
            context.spoil = lambda _, ptx, place=place: spoiled(ptx, kind, place)
            try:
                run()
            except KernelFault as fault:
                reports.append(str(fault))
    assert len(reports) >= len(found) - unnoticed
    assert all(re.search(what, report) for report in reports), reports


@pytest.mark.skipif(not LACKS_FENCE, reason="Triton has the fence since 3.7.1")
def test_the_fence_that_older_tritons_leave_out_is_reported() -> None:
    with executed("sm90"), pytest.raises(KernelFault, match=NO_FENCE.format("wrote")):
        multiply()
