"""Text by hand for what sm_90 does beside threads: mbarriers, proxies and their fences, lanes, tensor maps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ref.conformance.ptx.faults import KernelFault
from moe_ref.conformance.ptx.fresh import tracked
from moe_ref.conformance.ptx.launch import launch
from moe_ref.conformance.ptx.tensor_map import TensorMap
from moe_ref.conformance.ptx.text import Unreadable

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry by_hand(
	.param .align 64 .b8 by_hand_param_0[128],
	.param .u64 .ptr .global .align 1 by_hand_param_1
)
.reqntid 128
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [by_hand_param_1];
	mov.b64 	%rd4, by_hand_param_0;
	cvta.param.u64 	%rd4, %rd4;
	mov.u32 	%r1, %tid.x;
	shr.u32 	%r2, %r1, 5;
	setp.eq.s32 	%p1, %r1, 0;
	setp.lt.s32 	%p2, %r1, 32;
	mov.b32 	%r9, 0;
	mov.b32 	%r8, 1024;
"""
TAIL = """
	mul.wide.s32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.b32 	[%rd3], %r9;
	ret;
}
"""
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r8], {}; bar.sync 0;\n"
LOAD = "shl.b32 %r3, %r1, 2;\nld.shared.b32 %r9, [%r3];\n"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r8];\n"


def wait(parity: int | str, at: str = "%r8") -> str:
    return f"""{{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [{at}], {parity};
	@!complete bra.uni waitLoop;
}}
"""


def by_hand(body: str, tensor_map: TensorMap | int = 0) -> list[int]:
    out = torch.zeros(128, dtype=torch.int32)
    with tracked(0xFD) as fresh:
        launch(HEAD + body.replace("; ", ";\n") + TAIL, [tensor_map, out], (1,), 4096, fresh)
    return out.tolist()


def test_phases() -> None:
    """All threads arrive three times, and wait for each phase; a phase that is over has the other parity."""
    body = INIT.format(128) + (ARRIVE + wait(0) + ARRIVE + wait(1) + wait(1)) + ARRIVE + wait(0) + "mov.b32 %r9, 7;\n"
    assert by_hand(body) == [7] * 128


def sides(first: str, second: str) -> str:
    """The first warp on one side of a branch, the others on the other."""
    return f"@%p2 bra $L__1;\n{second}bra.uni $L__2;\n$L__1:\n{first}$L__2:\n"


@pytest.mark.parametrize("turned", [False, True])
def test_one_side_of_a_branch_waits_for_the_other(turned: bool) -> None:
    waits, arrives = wait(0) + "mov.b32 %r9, 1;\n", ARRIVE + "mov.b32 %r9, 2;\n"
    found = by_hand(INIT.format(96 if not turned else 32) + sides(*((arrives, waits) if turned else (waits, arrives))))
    assert found == [2 if turned else 1] * 32 + [1 if turned else 2] * 96


def test_sides_that_take_turns() -> None:
    """Each side arrives for the other, twice."""
    other = "@%p1 mbarrier.init.shared::cta.b64 [%r8+8], 96; " + INIT.format(32)
    there = ARRIVE.replace("[%r8]", "[%r8+8]")
    first = ARRIVE + wait(0, "%r8+8") + ARRIVE + wait(1, "%r8+8") + "mov.b32 %r9, 5;\n"
    second = wait(0) + there + wait(1) + there
    assert by_hand(other + sides(first, second)) == [5] * 32 + [0] * 96


NEVER = "waits for an mbarrier that never completes"
FAULTS = {
    "nobody arrives": (INIT.format(1) + wait(0), NEVER),
    "too few arrive": (INIT.format(129) + ARRIVE + wait(0), "1 arrivals and 0 bytes are missing"),
    "both sides wait": (INIT.format(128) + sides(wait(0) + ARRIVE, wait(0) + ARRIVE), NEVER),
    "bytes never come": (
        INIT.format(1) + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 64;\n" + wait(0),
        "0 arrivals and 64 bytes are missing",
    ),
    "arrives again": (
        INIT.format(1) + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 64;\n@%p1 " + ARRIVE,
        "arrives at a phase of an mbarrier that is over",
    ),
    "not initialised": ("st.shared.b64 [%r8], %rd1; bar.sync 0;\n" + ARRIVE, "an mbarrier that nobody initialised"),
    "ended": (
        INIT.format(1) + "@%p1 mbarrier.inval.shared::cta.b64 [%r8]; bar.sync 0;\n" + wait(0),
        "an mbarrier that nobody initialised",
    ),
    "initialised without a barrier": (
        INIT.format(128).replace(" bar.sync 0;", "") + ARRIVE,
        "race: reads shared memory that another warp wrote",
    ),
    "misaligned": ("mbarrier.init.shared::cta.b64 [%r8+4], 1;\n", "misaligned access to shared memory"),
    "a lane of some": ("@%p1 bra $L__1;\nelect.sync %r3|%p3, -1;\n$L__1:\n", "only some lanes of a warp run it"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case: str) -> None:
    body, what = FAULTS[case]
    with pytest.raises(KernelFault, match=what):
        by_hand(body)


def test_threads_that_waited_and_threads_that_wait_are_not_supported() -> None:
    """Here the first warp would arrive for the others, but only after all have met."""
    body = INIT.format(32) + "selp.b32 %r9, 1, 0, %p2;\n" + wait("%r9") + "@%p2 " + ARRIVE
    with pytest.raises(Unreadable, match="all threads of a program must wait, or one side of a branch"):
        by_hand(body)


def test_an_address_lives_until_its_mbarrier_ends() -> None:
    by_hand(INIT.format(1) + "@!%p1 bra $L__1;\nmbarrier.inval.shared::cta.b64 [%r8];\n$L__1:\n")


def test_one_lane_of_each_warp_is_elected() -> None:
    found = by_hand("elect.sync %r3|%p3, -1; selp.b32 %r9, 1, 0, %p3; mad.lo.s32 %r9, %r3, 100, %r9;\n")
    assert found == [1 if thread % 32 == 0 else 0 for thread in range(128)]


@pytest.mark.parametrize("trans", [False, True])
def test_matrices_are_stored(trans: bool) -> None:
    """Four matrices of a warp, at rows of 16 bytes in the order of lanes; each thread has two neighbours of a row."""
    body = """
	shl.b32 %r3, %r1, 4; shl.b32 %r4, %r1, 17; shl.b32 %r5, %r1, 1; or.b32 %r4, %r4, %r5; add.s32 %r4, %r4, 65536;
	add.s32 %r5, %r4, 16777472; add.s32 %r6, %r4, 33554944; add.s32 %r7, %r4, 50332416;
"""
    opcode = f"stmatrix.sync.aligned.m8n8.x4{'.trans' if trans else ''}.shared.b16"
    body += f"	{opcode} [%r3], {{%r4, %r5, %r6, %r7}}; bar.sync 0;\n" + LOAD
    found = torch.tensor(by_hand(body), dtype=torch.int32).view(torch.int16).reshape(16, 2, 8)
    lanes = torch.arange(32).reshape(8, 4)
    first = torch.stack([2 * lanes, 2 * lanes + 1], dim=-1).reshape(8, 8)  # of the first matrix of the first warp
    for matrix, own in enumerate(found.reshape(-1, 8)[:32].reshape(4, 8, 8)):
        assert torch.equal(own.T if trans else own, (first + 256 * matrix).to(torch.int16))


WRITE = "shl.b32 %r3, %r1, 4; st.shared.v4.b32 [%r3], {%r9, %r9, %r9, %r9};\n"
FENCE, BARRIER = "fence.proxy.async.shared::cta;\n", "bar.sync 0;\n"
SUMS = "mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; setp.eq.s32 %p4, %r9, 0;\n"
# A's rows and B's are in chunks of 16 bytes without a swizzle: 64 rows of 32 bytes from byte 0
READ = """mov.b64 %rd5, 0x0000000800400000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10, %r11, %r12, %r13}, %rd5, %rd5, %p4, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
"""
LAND = "wgmma.wait_group.sync.aligned 0;\nadd.f32 %r9, %r10, %r13;\n"
ALONE = "setp.eq.s32 %p5, %r2, 2;\n@!%p5 bra $L__9;\n{}$L__9:\n"  # by one warp
NO_FENCE = "no fence.proxy.async between it and what threads wrote there"
ASYNC = "shl.b32 %r3, %r1, 4; cp.async.cg.shared.global [%r3], [%rd1], 16; cp.async.commit_group;\n"
ARRIVED = "cp.async.wait_group 0;\n"


@pytest.mark.parametrize(
    ("before", "what"),
    [
        (ASYNC + ARRIVED + FENCE + BARRIER, None),  # by who waited for a cp.async
        (ASYNC + FENCE + ARRIVED + BARRIER, NO_FENCE),
        (WRITE + FENCE + BARRIER, None),  # by who wrote
        (WRITE + BARRIER + FENCE, None),  # by who reads
        (WRITE + BARRIER + ALONE.format(FENCE) + BARRIER, None),  # by another, between
        (WRITE + BARRIER, NO_FENCE),
        (FENCE + WRITE + BARRIER, NO_FENCE),
        (WRITE + BARRIER + ALONE.format(FENCE), NO_FENCE),  # by one that the readers have not met
        (WRITE + BARRIER + ALONE.format(FENCE).replace("2;", "0;"), NO_FENCE),  # by one of the readers
        (WRITE + ALONE.format(FENCE) + BARRIER, NO_FENCE),  # by one that not all writers had met
        (WRITE + FENCE, "race: reads shared memory that a warp wrote since the last barrier"),
        (FENCE + BARRIER, "reads shared memory that nobody wrote"),
    ],
)
def test_fences_between_proxies(before: str, what: str | None) -> None:
    with nullcontext() if what is None else pytest.raises(KernelFault, match=what):
        assert by_hand(before + SUMS + READ + LAND) == [0] * 128


READY = WRITE + FENCE + BARRIER + SUMS
CHANGE = WRITE.replace("{%r9", "{%r1")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (READ + "mov.b32 %r9, %r11;\n" + LAND, "touches a register of a wgmma in flight"),
        (READ + "mov.b32 %r11, 0;\n" + LAND, "touches a register of a wgmma in flight"),
        (READ + LAND + READ.replace("wgmma.fence.sync.aligned;", "") + LAND, "no wgmma.fence since its registers"),
        (READ + READ.replace("wgmma.fence.sync.aligned;", "") + LAND, None),  # only products had touched them
        (READ + WRITE + LAND, "writes shared memory that a wgmma in flight reads"),
        (READ + BARRIER + WRITE + LAND, "writes shared memory that a wgmma in flight reads"),
        (READ + LAND + CHANGE, "race: writes shared memory that another warp read since the last barrier"),
        (READ + LAND + BARRIER + CHANGE, None),
        (READ + READ + "wgmma.wait_group.sync.aligned 1;\n" + WRITE + LAND, "that a wgmma in flight reads"),
        (ALONE.format(READ) + LAND, "only some threads of a warp group run it"),
        (READ.replace("0x0000000800400000", "0x00000008004000F0") + LAND, "shared memory out of bounds"),
    ],
)
def test_products_in_flight(body: str, what: str | None) -> None:
    with nullcontext() if what is None else pytest.raises(KernelFault, match=what):
        by_hand(READY + body)


ONES = WRITE.replace("%r9", "%r14").replace("shl", "mov.b32 %r14, 0x3c003c00; shl") + FENCE + BARRIER + SUMS
FIVE = "mov.b32 %r10, 0f40A00000;\n"  # in the first of the sums


@pytest.mark.parametrize(
    ("adds", "signs", "expected"),
    [
        (True, "1, 1", 21.0),
        (True, "-1, 1", -11.0),
        (True, "1, -1", -11.0),
        (True, "-1, -1", 21.0),
        (False, "1, 1", 16.0),
    ],
)
def test_sums_and_signs(adds: bool, signs: str, expected: float) -> None:
    """Rows and columns of 16 ones, plus 5, or not."""
    product = READ.replace("%p4, 1, 1", f"%p4, {signs}")
    never = "" if adds else "setp.ne.s32 %p4, %r9, 0;\n"
    found = by_hand(ONES + FIVE + never + product + "wgmma.wait_group.sync.aligned 0;\nmov.b32 %r9, %r10;\n")
    assert torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist() == [expected] * 128


def map_of(values: torch.Tensor, box: list[int], **others: object) -> TensorMap:
    given = {"shape": list(values.shape), "strides": list(values.stride()), "block_shape": box} | others
    descriptor = TensorDescriptor(values, **given)  # type: ignore[arg-type]
    metadata = {"elem_size": values.element_size(), "swizzle": 0, "fp4_padded": False, "block_size": box}
    return TensorMap.of(descriptor, metadata)


# From byte 2048: leading offset 128 and stride offset 256; leading offset 1024
FIELDS = "mov.b64 %rd5, 0x0000001000080080;\nmov.b64 %rd6, 0x0000000000400080;"
COPY = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r9], [%rd4, {%r9, %r9}], [%r8];\n"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 512;\n"
APART = "@!%p2 bra $L__1;\n{}$L__1:\n@%p2 bra $L__2;\n{}$L__2:\n"
COPIED = INIT.format(1) + EXPECT + "@%p1 " + COPY
FURTHER = COPIED.replace("[%r9],", "[%r9+512],")
FIRST = "@!%p2 bra $L__1;\n{}$L__1:\n"  # by the first warp


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (COPIED + wait(0) + LOAD, None),
        (COPIED + FIRST.format(wait(0)) + BARRIER + LOAD, None),  # one warp waits for all
        (COPIED + FIRST.format(wait(0)) + LOAD, "race: reads shared memory that another warp"),
        (COPIED + APART.format(wait(0), wait(0)) + LOAD, None),  # one warp waits first
        (COPIED + LOAD + wait(0), "reads shared memory that a cp.async in flight writes"),
        (COPIED + wait(1) + LOAD + wait(0), "reads shared memory that a cp.async in flight writes"),
        (COPIED, "the program ends before it has landed"),
        (COPIED + "@%p1 mbarrier.inval.shared::cta.b64 [%r8];\n", "ends an mbarrier while copies are in flight"),
        (COPIED.replace("512", "496") + wait(0), "0 arrivals and -16 bytes are missing"),
        (COPIED.replace("[%r9], [%rd4", "[%r9+64], [%rd4") + wait(0), "must be a multiple of 128"),
        (COPIED.replace("[%r9], [%rd4", "[%r9+3840], [%rd4") + wait(0), "shared memory out of bounds"),
        (WRITE + BARRIER + COPIED + wait(0), NO_FENCE),
        (WRITE + FENCE + BARRIER + COPIED + wait(0), None),
        (WRITE + FIRST.format(FENCE) + BARRIER + FURTHER + wait(0), NO_FENCE),  # where another warp wrote
        (
            LOAD.join([WRITE + FENCE + BARRIER, BARRIER]) + "mov.b32 %r9, 0;\n" + COPIED + wait(0),
            "what threads read there",
        ),
    ],
)
def test_copies(body: str, what: str | None) -> None:
    values = torch.arange(1, 129, dtype=torch.int32).reshape(8, 16)
    with nullcontext() if what is None else pytest.raises(KernelFault, match=what):
        found = by_hand(body, map_of(values, [8, 16]))
        assert LOAD not in body or "mov.b32" in body or found == values.flatten().tolist()


@pytest.mark.parametrize("across", [0, 1])
def test_operands_without_a_swizzle(across: int) -> None:
    """Of 8 by 8 numbers in 128 bytes each: A's along its rows 256 bytes apart, and 128 along k; B's the other way.

    In 128 bytes, rows of A and columns of B are one after the other, or lie across.
    """
    values = ((torch.arange(1024) * 7) % 11 - 5).half()
    body = INIT.format(1) + EXPECT.replace("512", "2048") + "@%p1 " + COPY.replace("[%r9],", "[%r9+2048],") + wait(0)
    body += SUMS + READ.replace("0x0000000800400000, ", "").replace("mov.b64 %rd5, 0x0000000800400000;", FIELDS)
    body = body.replace("%rd5, %rd5, %p4, 1, 1, 0, 0", f"%rd5, %rd6, %p4, 1, 1, {across}, {across}")
    parts = values.reshape(8, 2, 8, 8)  # blocks of rows, blocks of k
    a = parts.transpose(2, 3) if across else parts
    b = values.reshape(2, 8, 8, 8)[:, 0]  # blocks of k; of columns there is one
    b = b if not across else b.transpose(1, 2)
    rows = a.permute(0, 2, 1, 3).reshape(64, 16).float()
    columns = b.permute(1, 0, 2).reshape(8, 16).float()
    expected = rows @ columns.T
    for register, (row, column) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
        found = by_hand(
            body + f"wgmma.wait_group.sync.aligned 0;\nmov.b32 %r9, %r{10 + register};\n",
            map_of(values.reshape(128, 8), [128, 8]),
        )
        thread = torch.arange(128)
        own = expected[16 * (thread // 32) + row + thread % 32 // 4, column + 2 * (thread % 4)]
        assert torch.equal(torch.tensor(found, dtype=torch.int32).view(torch.float32), own)


PRODUCT = (
    SUMS + READ.replace("0x0000000800400000", "0x0000000000000000") + LAND
)  # of the first 512 bytes, again and again


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (COPIED + wait(0) + PRODUCT, None),
        (COPIED + FIRST.format(wait(0)) + PRODUCT, "race: reads shared memory that a warp wrote"),
        (COPIED + PRODUCT + wait(0), "reads shared memory that a copy in flight writes"),
    ],
)
def test_products_of_copies(body: str, what: str | None) -> None:
    values = torch.zeros(8, 16, dtype=torch.int32)
    with nullcontext() if what is None else pytest.raises(KernelFault, match=what):
        by_hand(body, map_of(values, [8, 16]))


def test_a_fence_by_who_wrote_serves_what_is_copied_there_and_read() -> None:
    """Only the first warp writes and fences: no other has anything to fence."""
    first = FIRST.format(WRITE + FENCE) + BARRIER
    by_hand(first + COPIED + wait(0) + PRODUCT, map_of(torch.zeros(8, 16, dtype=torch.int32), [8, 16]))


def test_copies_beyond_the_tensor_are_reported() -> None:
    """A map whose shape or strides lead out of the argument's memory, or into another's part of it."""
    values = torch.zeros(8, 32, dtype=torch.int32)
    body = COPIED + wait(0)
    by_hand(body, map_of(values[:, :16], [8, 16]))
    for given, others in ((values[:, :12], {"shape": [8, 16]}), (values[:4], {"shape": [5, 32]})):
        with pytest.raises(KernelFault, match="memory out of bounds"):
            by_hand(body, map_of(given, [8, 16], **others))


@pytest.mark.parametrize(
    ("box", "others", "what"),
    [
        ([8, 2], {}, r"box=\(2, 8\)"),
        ([512, 4], {}, r"box=\(4, 512\)"),
        ([8, 4], {"swizzle": 3}, "swizzled in 128 bytes"),
        ([8, 4], {"elem_size": 2}, "elements of 2 bytes"),
        ([8, 4], {"shape": [9, 32]}, r"shape=\(32, 9\), beyond its tensor's memory"),
    ],
)
def test_maps_that_a_device_refuses(box: list[int], others: dict[str, Any], what: str) -> None:
    values = torch.zeros(8, 32, dtype=torch.int32)
    descriptor = TensorDescriptor(values, others.get("shape", [8, 32]), [32, 1], [8, 32])
    metadata = {"elem_size": 4, "swizzle": 0, "fp4_padded": False, "block_size": box} | others
    with pytest.raises(ValueError, match=what):
        TensorMap.of(descriptor, metadata)


@pytest.mark.parametrize(
    "line",
    [
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r3, %r4, %r5, %r6}, %rd1, %rd1, %p1, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r3, %r4}, %rd1, %rd1, %p1, 1, 1, 0, 0;",
        "mbarrier.test_wait.shared::cta.b64 %p1, [%r8], %rd1;",
        "mbarrier.arrive.shared::cta.b64 %rd2, [%r8];",
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd4, {%r9, %r9}], [%r9];",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r9], [%rd1], 64, [%r8];",
        "cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes [%r9], [%rd4], [%r8];",
        "bar.sync 1, 64;",
        "cvta.to.global.u64 %rd2, %rd1;",
    ],
)
def test_forms_that_are_not_known_stop(line: str) -> None:
    with pytest.raises(Unreadable, match=line.split()[0].replace(".", r"\.")):
        by_hand(line + "\n")
