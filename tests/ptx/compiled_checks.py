"""What the executor of PTX reports: kernels that do what they may not do, and kernels whose text was spoiled."""

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.faults import KernelFault
from spoiled import places, spoiled


@triton.jit
def copied(a, out, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n if MASKED else i >= 0
    tl.store(out + i, tl.load(a + i, mask=mask), mask=mask)


@triton.jit
def columns(a, out, stride, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    tl.store(out + tl.arange(0, BLOCK), tl.sum(tl.load(a + place), 1))


@triton.jit
def one_place(out, BLOCK: tl.constexpr, SAME: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 64, 7 if SAME else i)


@triton.jit
def neighbours(out, BLOCK: tl.constexpr, READ: tl.constexpr):
    i, own = tl.arange(0, BLOCK), tl.program_id(0)
    tl.store(out + own * BLOCK + i, i)
    if READ:
        seen = tl.load(out + tl.maximum(own - 1, 0) * BLOCK + i)
        tl.store(out + own * BLOCK + i, seen + 1)
    else:
        tl.store(out + i, i + own)


def fault(what: str, kernel: triton.JITFunction, source: str) -> str:
    """The pattern of a report: what, and the line of the kernel, as Triton read it, that has some source."""
    (line,) = [number for number, own in enumerate(kernel.raw_src, kernel.starting_line_number) if source in own]
    return rf"(?s){re.escape(what)}.*compiled_checks\.py:{line}:"


def test_bounds() -> None:
    a = torch.arange(100.0)
    with executed():
        out = torch.empty(100)
        copied[(2,)](a, out, 100, BLOCK=64, MASKED=True)
        assert torch.equal(out, a)
        with pytest.raises(KernelFault, match=fault("memory out of bounds", copied, "tl.load(a + i, mask=mask)")):
            copied[(2,)](a, out, 100, BLOCK=64, MASKED=False)


def test_gaps_between_strides_are_out_of_bounds() -> None:
    whole = torch.ones(16, 32)
    with executed():
        out = torch.empty(16)
        columns[(1,)](whole[:, 8:24], out, 32, BLOCK=16)
        assert out.tolist() == [16.0] * 16
        with pytest.raises(KernelFault, match=fault("memory out of bounds", columns, "tl.load(a + place), 1")):
            columns[(1,)](whole[:, 8:23], out, 32, BLOCK=16)


def test_memory_that_nobody_wrote() -> None:
    with executed():
        a, out = torch.empty(64), torch.empty(64)
        with pytest.raises(
            KernelFault, match=fault("reads memory that nobody wrote", copied, "tl.load(a + i, mask=mask)")
        ):
            copied[(1,)](a, out, 64, BLOCK=64, MASKED=True)
        a[:63], out = 1.0, torch.empty(64)
        copied[(1,)](a, out, 63, BLOCK=64, MASKED=True)
        copied[(1,)](out, a, 63, BLOCK=64, MASKED=True)  # a kernel wrote it
        with pytest.raises(KernelFault, match="nobody wrote"):
            copied[(1,)](out, a, 64, BLOCK=64, MASKED=True)


def test_threads_that_store_to_one_address() -> None:
    with executed():
        out = torch.empty(2, dtype=torch.int32)
        one_place[(1,)](out, BLOCK=128, SAME=True)
        with pytest.raises(KernelFault, match=fault("different values to one address", one_place, "7 if SAME else i")):
            one_place[(1,)](out, BLOCK=128, SAME=False)


@pytest.mark.parametrize(("read", "what"), [(True, "another program writes"), (False, "another program writes")])
def test_races_between_programs(read: bool, what: str) -> None:
    with executed():
        out = torch.empty(256, dtype=torch.int32)
        neighbours[(1,)](out, BLOCK=64, READ=read, num_warps=2)
        with pytest.raises(KernelFault, match=what):
            neighbours[(4,)](out, BLOCK=64, READ=read, num_warps=2)


def test_races_between_warps_of_a_program() -> None:
    """Triton lets one of two warps store what both have, and both load it."""
    with executed():
        out = torch.empty(64, dtype=torch.int32)
        what = fault("reads memory that another thread of the program wrote", neighbours, "tl.load(out")
        with pytest.raises(KernelFault, match=what):
            neighbours[(1,)](out, BLOCK=64, READ=True, num_warps=4)


@triton.jit
def summed(a, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = tl.load(a + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out + tl.arange(0, COLUMNS), tl.sum(x, 0))


@triton.jit
def multiplied(a, b, out, M, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        ks = k + i
        x = tl.load(a + i[:, None] * K + ks[None, :], mask=(i < M)[:, None], other=0.0)
        total = tl.dot(x, tl.load(b + ks[:, None] * BLOCK + i[None, :]), total)
    tl.store(out + i[:, None] * BLOCK + i[None, :], total, mask=(i < M)[:, None])


def sum_rows() -> None:
    a = torch.arange(64.0 * 32).reshape(64, 32)
    out = torch.empty(32)
    summed[(1,)](a, out, ROWS=64, COLUMNS=32, num_warps=4)
    assert torch.equal(out, a.sum(0))


def multiply() -> None:
    a, b = torch.randint(-3, 3, (30, 128)).bfloat16(), torch.randint(-3, 3, (128, 32)).bfloat16()
    out = torch.empty(30, 32)
    multiplied[(1,)](a, b, out, 30, 128, BLOCK=32, num_warps=4, num_stages=3)
    assert torch.equal(out, a.float() @ b.float())


# How many spoiled texts may go unnoticed. Of the barriers the one before the first copy, when no memory has been read
# yet; of the waits the one at the end, when nothing is in flight; of the guards that of the first rows, which are all
# there; of the sizes those that would be 0 if there were fewer steps than stages.
SPOILED: list[tuple[Callable[[], None], str, int]] = [
    (sum_rows, "barrier", 0),
    (multiply, "barrier", 1),
    (multiply, "wait", 1),
    (multiply, "guard", 1),
    (multiply, "zeros", 2),
]


@pytest.mark.parametrize(("run", "kind", "unnoticed"), SPOILED)
def test_spoiled_text_is_reported(run: Callable[[], None], kind: str, unnoticed: int) -> None:
    texts: list[str] = []
    with executed() as context:
        context.spoil = lambda _, ptx: texts.append(ptx) or ptx
        run()
        (text,) = texts
        found, missed = places(text, kind), []
        assert found
        for place in found:
            context.spoil = lambda _, ptx, place=place: spoiled(ptx, kind, place)
            try:
                run()
                missed.append(place)
            except KernelFault:
                pass
    assert len(missed) <= unnoticed, [text.splitlines()[place] for place in missed]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "sm75"}, "target='sm75': must be one of 'sm80', 'sm90'"),
        ({"how": "fast"}, "how='fast': must be a How or None"),
        ({"poison": 300}, "poison=300: must be a whole number from 0 to 255"),
    ],
)
def test_wrong_arguments_are_refused_at_entry(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message), executed(**given):  # type: ignore[arg-type]
        pass
