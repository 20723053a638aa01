"""The executor of PTX on small kernels, each against torch or NumPy: a wrong verdict must never be the tool's."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bitwise import same
from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.faults import KernelFault
from moe_ref.conformance.ptx.launch import How

INTEGERS = torch.tensor([0, 1, -1, 2, 7, -7, 31, 33, 2**31 - 1, -(2**31), 12345, -99999, 1 << 20, 3, 5, -3])


@triton.jit
def masked_add(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(a + i, mask=i < n, other=0.0)
    tl.store(out + i, left + tl.load(b + i, mask=i < n, other=0.0), mask=i < n)


@pytest.mark.parametrize("together", [1, 4096])
@pytest.mark.parametrize("reverse", [False, True])
def test_masked_add(together: int, reverse: bool) -> None:
    a, b = torch.randn(1000), torch.randn(1000)
    with executed(how=How(together=together, reverse=reverse)):
        out = torch.empty(1000)
        masked_add[(4,)](a, b, out, 1000, BLOCK=256)
    same(out, a + b)


@triton.jit
def arithmetic(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + BLOCK + i, x * y)
    tl.store(out + 2 * BLOCK + i, tl.where(y == 0, x, x // tl.where(y == 0, 1, y)))
    tl.store(out + 3 * BLOCK + i, tl.where(y == 0, x, x % tl.where(y == 0, 1, y)))
    tl.store(out + 4 * BLOCK + i, tl.minimum(x, y) ^ (x & y))
    tl.store(out + 5 * BLOCK + i, x >> (y & 31))
    tl.store(out + 6 * BLOCK + i, x << (y & 31))
    tl.store(out + 7 * BLOCK + i, tl.where(x < y, -x, ~y))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(dtype: torch.dtype) -> None:
    """Wrapping, division towards zero, shifts, all pairs of awkward numbers."""
    a, b = (grid.reshape(-1).to(dtype).contiguous() for grid in torch.meshgrid(INTEGERS, INTEGERS, indexing="ij"))
    with executed():
        out = torch.empty(8, 256, dtype=dtype)
        arithmetic[(1,)](a, b, out, BLOCK=256)
    x, y = a.numpy(), b.numpy()
    with np.errstate(all="ignore"):
        pairs = zip(x.tolist(), y.tolist(), strict=True)
        exact = [abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1) if q else p for p, q in pairs]
        quotient = np.array(exact).astype(x.dtype)  # of the least by -1 it wraps
        rest = np.where(y == 0, x, x - quotient * y)
        expected = [x + y, x * y, quotient, rest, np.minimum(x, y) ^ (x & y)]
        expected += [x >> (y & 31), x << (y & 31), np.where(x < y, -x, ~y)]
    for name, own, other in zip(["+", "*", "//", "%", "&", ">>", "<<", "where"], out.numpy(), expected, strict=True):
        assert (own == other).all(), name


@triton.jit
def strided(a, out, first, step, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + first + i.to(tl.int64) * step))


def test_arguments_widen_with_their_sign() -> None:
    a = torch.arange(256.0)
    with executed():
        out = torch.empty(64)
        strided[(1,)](a, out, 255, -3, BLOCK=64)
    same(out, a.flip(0)[: 64 * 3 : 3].contiguous())


@triton.jit
def reductions(a, out, chosen, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, LEFT: tl.constexpr):
    x = tl.load(a + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    i = tl.arange(0, ROWS if AXIS == 1 else COLUMNS)
    size = ROWS if AXIS == 1 else COLUMNS
    tl.store(out + i, tl.sum(x, AXIS))
    tl.store(out + size + i, tl.max(x, AXIS))
    tl.store(out + 2 * size + i, tl.min(x, AXIS))
    tl.store(chosen + i, tl.argmax(x, AXIS, tie_break_left=LEFT))
    tl.store(chosen + size + i, tl.argmin(x, AXIS, tie_break_left=LEFT))


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions(axis: int, warps: int) -> None:
    """Sums of small integers are exact in any order; there are ties in every row."""
    a = torch.randint(-3, 4, (32, 64), generator=torch.Generator().manual_seed(axis)).float()
    with executed():
        size = a.shape[1 - axis]
        out, chosen = torch.empty(3, size), torch.empty(2, size, dtype=torch.int32)
        reductions[(1,)](a, out, chosen, ROWS=32, COLUMNS=64, AXIS=axis, LEFT=True, num_warps=warps)
    same(out, torch.stack([a.sum(axis), a.amax(axis), a.amin(axis)]))
    first = torch.from_numpy(np.stack([a.numpy().argmax(axis), a.numpy().argmin(axis)])).int()
    same(chosen, first)


def test_argmax_with_nan() -> None:
    """Every comparison with a NaN is false, so lanes that exchange two of them disagree on the winner: reported."""
    a = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    a[5] = -math.inf
    for row, what in ((None, None), (3, "threads store different values to one address")):
        if row is not None:
            a[row] = math.nan
        with executed():
            out, chosen = torch.empty(3, 32), torch.empty(2, 32, dtype=torch.int32)
            with nullcontext() if what is None else pytest.raises(KernelFault, match=what):
                reductions[(1,)](a, out, chosen, ROWS=32, COLUMNS=64, AXIS=1, LEFT=True)
        if what is None:
            assert chosen[0].tolist() == a.numpy().argmax(1).tolist()


@triton.jit
def scanned(a, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + place, tl.cumsum(tl.load(a + place), AXIS))


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_scans(axis: int, warps: int) -> None:
    a = torch.randint(-9, 9, (16, 128), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    with executed():
        out = torch.empty_like(a)
        scanned[(1,)](a, out, ROWS=16, COLUMNS=128, AXIS=axis, num_warps=warps)
    same(out, a.cumsum(axis, dtype=torch.int32))


@triton.jit
def ordered(a, out, counts, moved, index, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i)
    tl.store(out + i, tl.sort(x))
    tl.store(counts + tl.arange(0, BINS), tl.histogram(x & (BINS - 1), BINS))
    tl.store(moved + i, tl.gather(x, tl.load(index + i), 0))


@pytest.mark.parametrize("warps", [1, 4])
def test_sort_histogram_gather(warps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-50, 50, (256,), generator=generator, dtype=torch.int32)
    index = torch.randint(0, 256, (256,), generator=generator, dtype=torch.int32)
    with executed():
        out, counts, moved = torch.empty_like(a), torch.empty(32, dtype=torch.int32), torch.empty_like(a)
        ordered[(1,)](a, out, counts, moved, index, BLOCK=256, BINS=32, num_warps=warps)
    same(out, a.sort().values)
    same(counts, torch.bincount(a & 31, minlength=32).int())
    same(moved, a[index.long()])


@triton.jit
def split_and_joined(a, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    left, right = tl.split(tl.load(a + i).reshape(BLOCK // 2, 2))
    tl.store(out + i, tl.join(right, left).reshape(BLOCK))
    tl.store(out + BLOCK + i, tl.trans(tl.load(a + i).reshape(BLOCK // 16, 16)).reshape(BLOCK))
    tl.store(out + 2 * BLOCK + i, tl.where(tl.load(a + i) > 0, tl.load(a + i) * 2, 0).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_split_join_transpose(dtype: torch.dtype) -> None:
    a = torch.randn(512, generator=torch.Generator().manual_seed(0)).to(dtype)
    with executed():
        out = torch.empty(3, 512, dtype=dtype)
        split_and_joined[(1,)](a, out, BLOCK=512)
    same(out[0], a.reshape(-1, 2).flip(1).reshape(-1).contiguous())
    same(out[1], a.reshape(32, 16).T.reshape(-1).contiguous())
    same(out[2], torch.where(a > 0, a * 2, 0))


@triton.jit
def product(a, b, out, M, N, K, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * K + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        w = tl.load(b + ks[:, None] * N + columns[None, :], mask=(ks < K)[:, None] & (columns < N)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], total, mask=mask)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("stages", "warps"), [(1, 4), (3, 8)])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
)
def test_products(dtype: torch.dtype, precision: str, stages: int, warps: int, transposed: bool) -> None:
    """Whole numbers are exact in every order; tails in all three sizes."""
    generator = torch.Generator().manual_seed(0)
    m, n, k = 50, 72, 88
    a = torch.randint(-8, 9, (m, k), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (k, n), generator=generator).to(dtype)
    if transposed:
        a, b, m, n = b.T.contiguous(), a.T.contiguous(), n, m
    with executed() as ran:
        out = torch.empty(m, n)
        tiles = {"BM": 32, "BN": 64, "BK": 32, "num_stages": stages, "num_warps": warps}
        product[(triton.cdiv(m, 32), triton.cdiv(n, 64))](a, b, out, m, n, k, PRECISION=precision, **tiles)
    same(out, a.float() @ b.float())
    assert len(ran.kernels) == 1


def test_tf32_is_cut_off() -> None:
    """Triton 3.7 rounds no operand: the low 13 bits of a number are not read."""
    a = torch.eye(16) * (1 + 2.0**-11 + 2.0**-13)
    b = torch.full((16, 16), 1 + 2.0**-10 + 2.0**-11 + 2.0**-12)
    with executed():
        out = torch.empty(16, 16)
        product[(1, 1)](a, b, out, 16, 16, 16, PRECISION="tf32", BM=16, BN=16, BK=16)
    assert set(out.reshape(-1).tolist()) == {1 + 2.0**-10}


@triton.jit
def diverging(a, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + tl.program_id(0) * BLOCK + i)
    steps = tl.sum((x > 0).to(tl.int32), 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(steps):
        total += tl.erf(x * step) + tl.sum(x, 0)
        if step == 3 * tl.program_id(0):
            total -= tl.max(total, 0)
    tl.store(out + tl.program_id(0) * BLOCK + i, total)


def test_programs_that_loop_for_different_times() -> None:
    """Side by side or one by one: the same bits; erf branches within a warp, between shuffles."""
    a = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for together in (1, 4096):
        with executed(how=How(together=together)):
            out = torch.empty(6, 64)
            diverging[(6,)](a, out, BLOCK=64, num_warps=2)
        results.append(out)
    same(*results)
    total = torch.zeros(6, 64, dtype=torch.float64)
    for row, x in enumerate(a.double()):
        for step in range(int((x > 0).sum())):
            total[row] += (x * step).erf() + x.sum()
            if step == 3 * row:
                total[row] -= total[row].max()
    torch.testing.assert_close(results[0].double(), total, rtol=1e-4, atol=1e-4)


@triton.jit
def counted(a, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + (tl.load(a + i) & 7), 1)


def test_atomics() -> None:
    a = torch.randint(0, 100, (512,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    with executed():
        out = torch.zeros(8, dtype=torch.int32)
        counted[(4,)](a, out, BLOCK=128)
    same(out, torch.bincount(a & 7, minlength=8).int())
