"""What is counted while compiled kernels are executed, against counts by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moe_ref.conformance.ptx.counters import KernelCounts, sectors_of, wavefronts_of
from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.fresh import tracked
from moe_ref.conformance.ptx.kinds import KINDS, kind_of
from moe_ref.conformance.ptx.launch import How, launch
from moe_ref.conformance.ptx.text import instruction

COUNTED = How(counts=True)
LANES = np.arange(32)
WARPS = np.arange(128)


@triton.jit
def strided(a, out, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(a + i * stride)
    tl.store(out + i, value)


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    left, right = tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns)
    tl.store(out + tl.program_id(0) * SIZE * SIZE + rows * SIZE + columns, tl.dot(left, right))


def counts_of(run: Callable[[], object], how: How = COUNTED) -> KernelCounts:
    with executed(how=how) as ran:
        run()
    (counts,) = ran.counts
    assert {own.kind for own in counts.instructions} <= {*KINDS}
    return counts


def loads(counts: KernelCounts) -> tuple[int, ...]:
    """Requests, sectors, fewest sectors and bytes of loads from global memory."""
    own = [o for o in counts.instructions if o.name.startswith("ld.global")]
    return tuple(sum(getattr(o, field) for o in own) for field in ("requests", "sectors", "ideal_sectors", "bytes"))


@pytest.mark.parametrize(
    ("stride", "begin", "expected", "read"),
    [
        (1, 0, (8, 128, 128, 4096), 4096),  # 16 bytes of a lane
        (8, 0, (32, 1024, 128, 4096), 32768),  # a sector for each number
        (2, 0, (32, 1024, 128, 4096), 8192),  # a lane has four numbers in a row, and loads them one by one
        (1, 1, (32, 520, 128, 4096), 4128),  # so here; the fourth of the last lane is in the next sector
        (0, 0, (32, 32, 32, 4096), 32),  # all lanes ask for one number
    ],
)
def test_global_memory(stride: int, begin: int, expected: tuple[int, ...], read: int) -> None:
    a = torch.randn(8 * 1024 + 1)
    counts = counts_of(lambda: strided[(1,)](a[begin:], torch.empty(1024), stride, BLOCK=1024))
    assert loads(counts) == expected
    assert (counts.read, counts.written, counts.programs, counts.threads) == (read, 4096, 1, 128)
    assert counts.total("sectors", "global") == expected[1] + 128


def test_by_source() -> None:
    """Sectors by line: those of the load are eight times those of the store."""
    counts = counts_of(lambda: strided[(2,)](torch.randn(8 * 512), torch.empty(512), 8, BLOCK=256))
    lines = [number for number, own in enumerate(Path(__file__).read_text().splitlines(), 1)
             if "tl.load(a + i * stride)" in own or "tl.store(out + i, value)" in own]  # fmt: skip
    found = {int(source.split(":")[1]): count for source, count in counts.by_source("sectors").items()}
    assert found == {lines[0]: 512, lines[1]: 64}


def test_products() -> None:
    """64 x 64 x 64 in mma of 16 x 8 x 16, in each of two programs."""
    a, b = (torch.randn(64, 64).bfloat16() for _ in range(2))
    counts = counts_of(lambda: product[(2,)](a, b, torch.empty(2, 64, 64), SIZE=64))
    assert counts.by_kind()["tensor"] == 2 * 4 * 8 * 4
    assert (counts.read, counts.written) == (2 * 64 * 64 * 2, 2 * 64 * 64 * 4)
    assert sum(counts.by_kind().values()) == counts.total("warps")


def test_how_many_run_side_by_side_counts_nothing() -> None:
    a, out = torch.randn(3 * 1024), torch.empty(1024)
    found = [
        counts_of(lambda: strided[(4,)](a, out, 3, BLOCK=256), How(counts=True, together=n)) for n in (1, 256, 4096)
    ]
    assert found[0] == found[1] == found[2]


def test_nothing_is_counted_unasked() -> None:
    with executed() as ran:
        strided[(1,)](torch.randn(64), torch.empty(64), 1, BLOCK=64)
    assert ran.counts == []


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
	.reg .b32 	%r<12>;
	.reg .b64 	%rd<5>;
	ld.param.b64 	%rd1, [by_hand_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.s32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
"""
TAIL = "\n\tret;\n}\n"


def by_hand(body: str) -> KernelCounts:
    """Of a program with 64 threads: %r1 is the thread, %rd3 the address of its number of 64 in global memory."""
    with tracked(0xFD) as fresh:
        counts = launch(HEAD + body + TAIL, [torch.zeros(64, dtype=torch.int32)], (1,), 16384, fresh, COUNTED)
    assert counts is not None
    return counts


def test_warps_that_branch() -> None:
    """48 of 64 threads go one way: warp 0 and half of warp 1; the other half the other way."""
    counts = by_hand("""
	setp.lt.s32 	%p1, %r1, 48;
	@%p1 bra 	$L_taken;
	xor.b32 	%r2, %r1, 1;
	bra.uni 	$L_end;
$L_taken:
	or.b32 	%r2, %r1, 1;
$L_end:
	st.global.b32 	[%rd3], %r2;
""")
    warps = {own.name: own.warps for own in counts.instructions}
    assert {name: warps[name] for name in ("xor.b32", "or.b32", "bra", "bra.uni", "st.global.b32")} == {
        "xor.b32": 1, "or.b32": 2, "bra": 2, "bra.uni": 1, "st.global.b32": 2,
    }  # fmt: skip
    assert counts.by_kind() == {"parameter": 2, "move": 2, "integer": 7, "predicate": 2, "branch": 5, "global": 2}


def test_guards() -> None:
    """An instruction whose guard is false is issued; half a warp asks for half of the sectors, no lane for none."""
    counts = by_hand("""
	setp.lt.s32 	%p1, %r1, 16;
	mov.b32 	%r2, 0;
	@%p1 ld.global.b32 	%r2, [%rd3];
	@%p1 add.s32 	%r2, %r2, 1;
	@%p1 st.global.b32 	[%rd3], %r2;
""")
    for own in counts.instructions:
        if own.kind == "global":
            assert (own.warps, own.requests, own.sectors, own.ideal_sectors, own.bytes) == (2, 1, 2, 2, 64)
    assert [own.warps for own in counts.instructions if own.name == "add.s32"] == [2]
    assert (counts.read, counts.written) == (64, 64)


def test_copies() -> None:
    """16 of 64 threads copy 16 bytes of memory, the others zeros: all write to shared memory."""
    counts = by_hand("""
	shl.b32 	%r2, %r1, 4;
	mul.wide.s32 	%rd2, %r2, 1;
	add.s64 	%rd3, %rd1, %rd2;
	setp.lt.s32 	%p1, %r1, 16;
	selp.b32 	%r3, 16, 0, %p1;
	cp.async.cg.shared.global 	[%r2], [%rd3], 16, %r3;
	cp.async.commit_group;
	cp.async.wait_group 	0;
	bar.sync 	0;
	bar.sync 	0;
""")
    (own,) = (own for own in counts.instructions if own.requests)
    assert (own.kind, own.warps, own.requests, own.sectors, own.ideal_sectors, own.bytes) == ("copy", 2, 1, 8, 8, 256)
    assert (own.wavefronts, own.ideal_wavefronts, own.shared_bytes) == (8, 8, 1024)
    assert (counts.by_kind()["copy"], counts.by_kind()["barrier"], counts.barriers) == (6, 4, 2.0)
    assert (counts.read, counts.written) == (256, 0)


@pytest.mark.parametrize(("row", "conflicts"), [(128, 8), (144, 1), (32, 2)])
def test_shared_memory(row: int, conflicts: int) -> None:
    """Rows of 16 bytes: 8 of them in one pass, unless their banks are the same; each warp reads 4 matrices."""
    counts = by_hand(f"""
	mul.lo.s32 	%r2, %r1, {row};
	st.shared.v4.b32 	[%r2], {{%r1, %r1, %r1, %r1}};
	bar.sync 	0;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 	{{%r3, %r4, %r5, %r6}}, [%r2];
	ld.shared.b32 	%r7, [0];
""")
    found = {own.name: (own.wavefronts, own.ideal_wavefronts) for own in counts.instructions if own.shared_bytes}
    store, rows, one = found.values()
    assert store == rows == (8 * conflicts, 8)
    assert one == (2, 2)  # all lanes share a word
    assert counts.total("wavefronts", "ldmatrix") == 8 * conflicts


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("add.s32 %r1, %r2, %r3", "integer"),
        ("add.f32 %f1, %f2, %f3", "float"),
        ("fma.rn.bf16x2 %r1, %r2, %r3, %r4", "float"),
        ("ex2.approx.ftz.f32 %f1, %f2", "float"),
        ("selp.f32 %f1, %f2, %f3, %p1", "integer"),
        ("prmt.b32 %r1, %r2, %r3, 0x7632", "integer"),
        ("cvt.rn.bf16x2.f32 %r1, %f2, %f3", "convert"),
        ("setp.lt.f32 %p1, %f2, %f3", "predicate"),
        ("mov.b32 %r1, %r2", "move"),
        ("ld.param.b64 %rd1, [param_0]", "parameter"),
        ("ld.shared.v2.b32 {%r1, %r2}, [%r3]", "shared"),
        ("st.shared::cta.b32 [%r1], %r2", "shared"),
        ("atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2", "global"),
        ("cp.async.wait_group 0", "copy"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1", "lanes"),
        ("bar.warp.sync -1", "lanes"),
        ("bar.sync 0", "barrier"),
        ("membar.gl", "other"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert kind_of(instruction(text)) == kind


@pytest.mark.parametrize(
    ("who", "at", "size", "expected"),
    [
        (LANES, LANES * 4, 4, (1, 1)),
        (LANES, LANES * 8, 4, (2, 1)),  # every other bank
        (LANES, LANES * 128, 4, (32, 1)),  # a column of a matrix with 32 words in a row
        (LANES, LANES * 132, 4, (1, 1)),  # and with 33
        (LANES, LANES * 0, 4, (1, 1)),  # one word for all
        (LANES, LANES % 2 * 128, 4, (2, 1)),  # two words of one bank
        (LANES, LANES * 2, 2, (1, 1)),  # two lanes share each word
        (LANES, LANES * 8, 8, (2, 2)),  # a pass for each half
        (LANES, LANES * 16, 16, (4, 4)),  # and for each quarter
        (LANES, LANES * 128, 16, (32, 4)),  # each quarter asks eight times for four banks
        (LANES[:8], LANES[:8] * 16, 16, (1, 1)),
        (LANES[::4], LANES[::4] * 128, 16, (8, 4)),  # two lanes of each quarter
        (WARPS, WARPS * 8, 4, (8, 4)),  # each warp for itself
        (WARPS[40:], WARPS[40:] * 0 + 64, 4, (3, 3)),
    ],
)
def test_wavefronts(who: np.ndarray, at: np.ndarray, size: int, expected: tuple[int, int]) -> None:
    assert wavefronts_of(who, at, size) == expected
    order = np.random.default_rng(0).permutation(len(who))
    assert wavefronts_of(who[order], at[order] + 4096, size) == expected


@pytest.mark.parametrize(
    ("who", "at", "size", "expected"),
    [
        (LANES, LANES * 4, 4, (1, 4, 4)),
        (LANES, LANES * 4 + 16, 4, (1, 5, 4)),
        (LANES, LANES * 16, 16, (1, 16, 16)),
        (LANES, LANES * 32, 2, (1, 32, 2)),
        (LANES, LANES * 0, 8, (1, 1, 1)),
        (LANES[:3], LANES[:3] * 2, 2, (1, 1, 1)),
        (WARPS, WARPS % 32 * 4, 4, (4, 16, 16)),  # each warp asks for the same
        (WARPS[::64], WARPS[::64] * 4, 4, (2, 2, 2)),
    ],
)
def test_sectors(who: np.ndarray, at: np.ndarray, size: int, expected: tuple[int, int, int]) -> None:
    assert sectors_of(who, at + (0x7F << 40), size) == expected
