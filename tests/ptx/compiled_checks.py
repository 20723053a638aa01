"""What the executor of PTX reports: kernels that do what they may not do, and kernels whose text was spoiled."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.faults import KernelFault
from moe_ref.conformance.ptx.fresh import tracked
from moe_ref.conformance.ptx.launch import How, launch
from moe_ref.conformance.ptx.text import Unreadable
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


def fault(what: str, source: str) -> str:
    """The pattern of a report: what, and the function and line of this file that the kernel has it in."""
    lines = Path(__file__).read_text().splitlines()
    (line,) = [number for number, own in enumerate(lines, 1) if source in own and "fault(" not in own]
    return rf"(?s){re.escape(what)}.*compiled_checks\.py:{line}:"


def test_bounds() -> None:
    a = torch.arange(100.0)
    with executed():
        out = torch.empty(100)
        copied[(2,)](a, out, 100, BLOCK=64, MASKED=True)
        assert torch.equal(out, a)
        with pytest.raises(KernelFault, match=fault("memory out of bounds", "tl.load(a + i, mask=mask)")):
            copied[(2,)](a, out, 100, BLOCK=64, MASKED=False)


def test_gaps_between_strides_are_out_of_bounds() -> None:
    whole = torch.ones(16, 32)
    with executed():
        out = torch.empty(16)
        columns[(1,)](whole[:, 8:24], out, 32, BLOCK=16)
        assert out.tolist() == [16.0] * 16
        with pytest.raises(KernelFault, match=fault("memory out of bounds", "tl.load(a + place), 1")):
            columns[(1,)](whole[:, 8:23], out, 32, BLOCK=16)


def test_memory_that_nobody_wrote() -> None:
    with executed():
        a, out = torch.empty(64), torch.empty(64)
        with pytest.raises(KernelFault, match=fault("reads memory that nobody wrote", "tl.load(a + i, mask=mask)")):
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
        with pytest.raises(KernelFault, match=fault("different values to one address", "7 if SAME else i")):
            one_place[(1,)](out, BLOCK=128, SAME=False)


@pytest.mark.parametrize(("read", "what"), [(True, "reads memory that another"), (False, "another program writes")])
def test_races_between_programs(read: bool, what: str) -> None:
    with executed():
        out = torch.empty(256, dtype=torch.int32)
        neighbours[(1,)](out, BLOCK=64, READ=read)
        with pytest.raises(KernelFault, match=what):
            neighbours[(4,)](out, BLOCK=64, READ=read)


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


HEAD = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry by_hand(
	.param .u64 .ptr .global .align 1 by_hand_param_0
)
.reqntid 64
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<5>;
	ld.param.b64 	%rd1, [by_hand_param_0];
	mov.u32 	%r1, %tid.x;
	setp.lt.s32 	%p1, %r1, 48;
"""
TAIL = """
	mul.wide.s32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.b32 	[%rd3], %r2;
	ret;
}
"""


def by_hand(body: str, how: How | None = None) -> torch.Tensor:
    out = torch.zeros(64, dtype=torch.int32)
    with tracked(0xFD) as fresh:
        launch(HEAD + body + TAIL, [out], (1,), 256, fresh, how)
    return out


@pytest.mark.parametrize("mode", ["", ".rn"])
def test_contraction(mode: str) -> None:
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, or 0 if the product rounds first; a rounding mode forbids contraction."""
    body = f"""
	mov.b32 	%r3, 0f3F800800;
	mul{mode}.f32 	%r4, %r3, %r3;
	sub{mode}.f32 	%r2, %r4, 0f3F801000;
"""
    found = [float(by_hand(body, How(contracts=contracts)).view(torch.float32)[0]) for contracts in (False, True)]
    assert found == [0.0, 0.0 if mode else 2.0**-24]


@pytest.mark.parametrize(
    ("relation", "holds"),
    [
        ("eq", (0, 0)),
        ("ne", (1, 0)),
        ("neu", (1, 1)),
        ("lt", (1, 0)),
        ("geu", (0, 1)),
        ("nan", (0, 1)),
        ("num", (1, 0)),
    ],
)
def test_comparisons(relation: str, holds: tuple[int, int]) -> None:
    """1 with 2, and with a NaN."""
    for other, expected in zip(("0f40000000", "0f7FC00000"), holds, strict=True):
        lines = ["mov.b32 %r3, 0f3F800000;", f"setp.{relation}.f32 %p2, %r3, {other};", "selp.b32 %r2, 1, 0, %p2;"]
        assert by_hand("\n".join(["", *lines, ""])).tolist() == [expected] * 64


@pytest.mark.parametrize(
    ("mode", "clamp", "source"),
    [
        ("up", 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("idx", 31, lambda _: 3),
        ("bfly", 31, lambda lane: lane ^ 3),
        ("up", 0x1800, lambda lane: lane - 3 if lane % 8 >= 3 else lane),  # in segments of 8 lanes
        ("down", 0x181F, lambda lane: lane + 3 if lane % 8 + 3 < 8 else lane),
        ("idx", 0x181F, lambda lane: lane // 8 * 8 + 3),
        ("bfly", 1, lambda lane: lane ^ 3 if lane ^ 3 <= 1 else lane),
    ],
)
def test_shuffles(mode: str, clamp: int, source: Callable[[int], int]) -> None:
    """As CUDA's intrinsics have it; a lane without a source keeps its own."""
    found = by_hand(f"\n	shfl.sync.{mode}.b32 	%r2, %r1, 3, {clamp}, -1;\n")
    assert found.tolist() == [warp + source(lane) for warp in (0, 32) for lane in range(32)]


def test_divergent_branches_meet() -> None:
    body = """
	mov.b32 	%r2, 1;
	@%p1 bra 	$L__1;
	add.s32 	%r2, %r2, %r1;
	bra.uni 	$L__2;
$L__1:
	sub.s32 	%r2, %r2, %r1;
$L__2:
	shfl.sync.bfly.b32 	%r2, %r2, 1, 31, -1;
"""
    threads = torch.arange(64)
    expected = torch.where(threads < 48, 1 - threads, 1 + threads)[threads ^ 1]
    assert torch.equal(by_hand(body), expected.int())


@pytest.mark.parametrize(
    ("instruction", "what"),
    [
        ("bar.sync 	0;", "a barrier that only some threads of a program reach"),
        ("shfl.sync.bfly.b32 	%r2, %r1, 1, 31, -1;", "only some lanes of a warp run it"),
        ("ld.global.b32 	%r2, [%rd1+2];", "misaligned access to memory"),
        ("ld.global.v2.b32 	{%r2, %r3}, [%rd1+4];", "misaligned access to memory"),
        ("ld.global.b32 	%r2, [%rd1+256];", "memory out of bounds"),
        ("st.global.b32 	[%rd1+-4], %r2;", "memory out of bounds"),
        ("ld.shared.b32 	%r2, [%r1];", "misaligned access to shared memory"),
    ],
)
def test_what_only_some_threads_do(instruction: str, what: str) -> None:
    with pytest.raises(KernelFault, match=what):
        by_hand(f"\n	mov.b32 	%r2, 1;\n	@!%p1 bra 	$L__1;\n	{instruction}\n$L__1:\n")


def test_shared_memory() -> None:
    """Out of bounds; nobody wrote it; another warp did, before a barrier or without one."""
    store = "\n	shl.b32 	%r3, %r1, 2;\n	st.shared.b32 	[%r3], %r1;\n"
    other = "	xor.b32 	%r4, %r3, 128;\n	ld.shared.b32 	%r2, [%r4];\n"
    assert torch.equal(by_hand(store + "	bar.sync 	0;\n" + other), (torch.arange(64) ^ 32).int())
    for body, what in (
        (store + other, "race: reads shared memory that another warp wrote"),
        ("\n	shl.b32 	%r3, %r1, 2;\n" + other, "reads shared memory that nobody wrote"),
        (store.replace(", 2;", ", 3;") + "	mov.b32 	%r2, 0;\n", "shared memory out of bounds"),
        (
            store + "	bar.sync 	0;\n" + other + "	st.shared.b32 	[%r3], %r2;\n",
            "race: writes shared memory that",
        ),
    ):
        with pytest.raises(KernelFault, match=what):
            by_hand(body)


@pytest.mark.parametrize(
    "line", ["frobnicate.b32 	%r2, %r1;", "add.sat.s32 	%r2, %r1, %r1;", "cvt.rn.e4m3x2.f32 	%r2, %r1, %r1;"]
)
def test_unknown_instructions_stop_with_their_name_and_line(line: str) -> None:
    name = line.split()[0]
    with pytest.raises(Unreadable, match=rf"line \d+: {re.escape(name)} "):
        by_hand(f"\n	{line}\n")


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
