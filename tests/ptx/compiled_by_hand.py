"""The executor of PTX on instructions written by hand: what threads do together, and what is reported."""

import re
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from by_hand import by_hand
from moe_ref.conformance.ptx.faults import KernelFault
from moe_ref.conformance.ptx.text import Unreadable


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
        (
            store + "	bar.sync 	0;\n" + other + "	atom.shared.add.u32 	%r2, [%r3], 1;\n",
            "race: changes shared memory that another warp read",
        ),
        (
            store + "	atom.shared.add.u32 	%r2, [%r3], 1;\n" + other,
            "race: reads shared memory that another warp wrote",
        ),
    ):
        with pytest.raises(KernelFault, match=what):
            by_hand(body)


STORE = "\n	shl.b32 	%r3, %r1, 2;\n	mov.b32 	%r2, 0;\n	st.shared.b32 	[%r3], %r1;\n"
READ = "	xor.b32 	%r4, %r3, 4;\n	ld.shared.b32 	%r2, [%r4];\n"  # what the lane beside it wrote
OTHERS = "writes memory that another thread of the program"
WROTE = "race: reads shared memory that another lane of the warp wrote"
TOUCHED = "race: writes shared memory that another lane of the warp wrote or read"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (STORE + READ, WROTE),
        (STORE + "	shfl.sync.bfly.b32 	%r5, %r1, 1, 31, -1;\n" + READ, WROTE),
        (STORE + "	bar.warp.sync 	-1;\n" + READ, ""),
        (STORE + "	bar.sync 	0;\n" + READ, ""),
        (STORE + "	bar.warp.sync 	-1;\n" + READ + "	st.shared.b32 	[%r3], %r2;\n", TOUCHED),
        (
            STORE
            + "	bar.warp.sync 	-1;\n"
            + READ
            + "	bar.warp.sync 	-1;\n	st.shared.b32 	[%r3], %r2;\n",
            "",
        ),
        (STORE + "	ld.shared.b32 	%r2, [%r3];\n	st.shared.b32 	[%r3], %r2;\n", ""),
        (STORE + "	xor.b32 	%r4, %r3, 4;\n	st.shared.b32 	[%r4], 7;\n", TOUCHED),
        ("\n	and.b32 	%r3, %r1, 32;\n	st.shared.b32 	[%r3], 7;\n	ld.shared.b32 	%r2, [%r3];\n", ""),
    ],
)
def test_lanes_of_a_warp(body: str, what: str) -> None:
    """They meet at barriers only; lanes that write the same do not race."""
    with pytest.raises(KernelFault, match=what) if what else nullcontext():
        by_hand(body)


COPY = """
	cvt.u64.u32 	%rd2, %r3;
	add.s64 	%rd3, %rd1, %rd2;
	cp.async.ca.shared.global 	[%r3], [%rd3], 4;
"""
FLYING = "shared memory that a cp.async in flight writes"
OWN = "	ld.shared.b32 	%r2, [%r3];\n"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (COPY + OWN, FLYING),
        (COPY + "	cp.async.wait_group 	0;\n" + OWN, FLYING),
        (COPY + "	st.shared.b32 	[%r3], 7;\n", FLYING),
        (COPY + "	cp.async.commit_group;\n	cp.async.wait_group 	1;\n" + OWN, FLYING),
        (COPY + "	cp.async.commit_group;\n	cp.async.wait_group 	0;\n" + OWN, ""),
        (COPY + "	cp.async.commit_group;\n	cp.async.wait_group 	0;\n" + READ, WROTE),
        (COPY + "	cp.async.commit_group;\n	bar.sync 	0;\n	cp.async.wait_group 	0;\n" + READ, WROTE),
    ],
)
def test_copies_in_flight(body: str, what: str) -> None:
    """Into memory that has been written before; other lanes see a copy behind a barrier."""
    with pytest.raises(KernelFault, match=what) if what else nullcontext():
        by_hand(STORE + "	bar.sync 	0;\n" + body)


SAVED = """
	mul.wide.s32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.b32 	[%rd3], %r1;
	xor.b32 	%r3, %r1, 32;
	mul.wide.s32 	%rd2, %r3, 4;
	add.s64 	%rd4, %rd1, %rd2;
"""


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("	ld.global.b32 	%r2, [%rd4];\n", "reads memory that another thread of the program wrote"),
        (
            "	st.global.b32 	[%rd4], 7;\n	mov.b32 	%r2, %r1;\n",
            "writes memory that another thread of the program",
        ),
        ("	bar.sync 	0;\n	ld.global.b32 	%r2, [%rd4];\n	bar.sync 	0;\n", ""),
        (
            "	bar.sync 	0;\n	ld.global.b32 	%r2, [%rd4];\n",
            "writes memory that another thread of the program",
        ),
        ("	ld.global.b32 	%r2, [%rd3];\n", ""),
    ],
)
def test_warps_of_a_program_in_global_memory(body: str, what: str) -> None:
    with pytest.raises(KernelFault, match=what) if what else nullcontext():
        by_hand(SAVED + body)


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.b32 	%r2, %r1;",
        "add.sat.s32 	%r2, %r1, %r1;",
        "cvt.rn.e4m3x2.f32 	%r2, %r1, %r1;",
        "cvt.rz.bf16.f32 	%rs1, %r1;",
        "cvt.rz.f16x2.f32 	%r2, %r1, %r1;",
        "cvt.rn.tf32.f32 	%r2, %r1;",
        "cvt.rn.bf16.f64 	%rs1, %rd1;",
        "rcp.approx.ftz.f64 	%rd2, %rd1;",
        "div.f32 	%r2, %r1, %r1;",
    ],
)
def test_unknown_instructions_stop_with_their_name_and_line(line: str) -> None:
    name = line.split()[0]
    with pytest.raises(Unreadable, match=rf"line \d+: {re.escape(name)} "):
        by_hand(f"\n	{line}\n")
