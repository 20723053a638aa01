"""``kernels --execute``: counts of a layer from slices of it, what bounds its kernels, the table and the picture."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from executors._bench.layers import LAYERS
from executors._cli.app import app
from executors._counts import plot, report
from executors._counts.bounds import bound_by, bounds, issued, l2_bytes
from executors._counts.cards import CARDS
from executors._counts.fit import FIELDS, Axes, Sizes, added, differences, extrapolated, times
from executors._counts.run import CountPlan, LayerCounts
from executors._triton import device
from moe_ref.conformance.ptx.counters import InstructionCounts, KernelCounts

A100 = CARDS["a100"]
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
AXES = Axes((2, 4), (64, 96), (32, 48), (1, 2))
LAYER = Sizes(128, 2048, 768, 108)


def instruction(name: str, kind: str, source: str = "", **numbers: int) -> InstructionCounts:
    return InstructionCounts(name, kind, source, 1, **(dict.fromkeys(FIELDS, 0) | numbers))


def kernel(*instructions: InstructionCounts, read: int = 0, written: int = 0, programs: int = 1) -> KernelCounts:
    return KernelCounts("made_kernel", programs, 128, instructions, read, written)


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


EXACT = """
import json, sys, torch
from executors._bench.layers import LAYERS
from executors._counts.fit import Axes, Sizes, differences, extrapolated
from executors._counts.slices import Slice, count

SIDES = ("read", "written")
rows, multiprocessors = json.loads(sys.argv[1])
shape = LAYERS["mixtral-8x7b"]
axes = Axes((2, 4), (128, 256), (128, 256), multiprocessors)
to = Sizes(6, 384, 384, 3 if len(multiprocessors) > 1 else 1)
slices = [Slice(shape, sizes, rows, torch.bfloat16, "", True) for sizes in [*axes.points(), to]]
*found, whole = map(count, slices)
foretold = extrapolated(found, axes, to)
ends = [abs(getattr(own, side) - getattr(whole[label], side)) for label, own in foretold.items() for side in SIDES]
print(json.dumps([list(whole), differences(foretold, whole), max(ends)]))
"""


@pytest.mark.parametrize(
    ("rows", "multiprocessors"),
    [(1, [1]), pytest.param(72, [1, 2], marks=pytest.mark.nightly)],  # small tiles; programs that take several tiles
)
def test_counts_of_a_layer_follow_from_its_slices(rows: int, multiprocessors: list[int]) -> None:
    """Every count of every kernel, forward and backward, against the layer itself."""
    done = child("-c", EXACT, json.dumps([rows, multiprocessors]))
    assert done.returncode == 0, done.stderr
    labels, off, ends = json.loads(done.stdout)
    assert labels == ["up", "down", "dh", "dz", "outer down", "outer up", "dx"]
    # With fewer than 8 experts neighbouring slots of one share sectors of their weights, more or less by E.
    assert off.pop("sectors", 0.0) < (0.02 if rows > 1 else 1e-9)
    assert off.keys() <= {"read", "written"}
    assert ends <= 64  # sectors at the ends of tensors


def test_the_bundled_layer(tmp_path: Path) -> None:
    """Eight tokens, a row for each of 32 experts: what the up projection must do is known."""
    json_path, picture = tmp_path / "counts.json", tmp_path / "counts.png"
    options = ("--tokens", "8", "--json", str(json_path), "--plot", str(picture))
    done = child("-m", "executors", "kernels", "--execute", "bundled", *options)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.split("wrote ")[0].splitlines())) <= 80, done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(json_path.read_text())
    assert list(found["kernels"]) == ["route", "group", "up", "down", "combine"]
    up = found["kernels"]["up"]
    assert up["warp_instructions"]["tensor"] == 32 * 4 * 2 * 64  # experts, tiles of 64 columns, steps of 128, mma
    weights, biases, rows = 32 * 256 * 160 * 2, 32 * 256 * 2, 8 * 160 * 2
    assert weights + biases + rows <= up["read"] <= 1.01 * (weights + biases + rows)
    assert up["written"] == 32 * 128 * 2
    assert up["bound_by"] == "dram"
    assert up["seconds"]["dram"] == (up["read"] + up["written"]) / 2.039e12
    assert (found["rows"], found["counted_tokens"], found["foretold"]) == (1, 8, None)


def test_extrapolation_is_exact_for_its_terms() -> None:
    def made(sizes: Sizes) -> KernelCounts:
        e, h, i, p = sizes
        per_expert = 7 + 3 * h + 2 * i + h * i // 8
        numbers = {"warps": 5 + 11 * p + e * per_expert, "sectors": e * h, "wavefronts": 4 * e * i}
        return kernel(instruction("add.s32", "integer", **numbers), read=e * h * i, written=e * i, programs=p)

    points = AXES.points()
    found = [{"up": made(sizes)} for sizes in points]
    assert len(points) == 6
    assert extrapolated(found, AXES, LAYER) == {"up": made(LAYER)}
    fixed = AXES._replace(hidden=(64,), multiprocessors=(1,))
    to = Sizes(128, 64, 768, 1)
    assert len(fixed.points()) == 3
    assert extrapolated([{"up": made(sizes)} for sizes in fixed.points()], fixed, to) == {"up": made(to)}


def test_other_counts_are_noticed() -> None:
    """A count in the square of H is not foretold; slices that compile to other texts are refused."""
    found = [{"up": kernel(instruction("ld", "global", sectors=s.hidden**2))} for s in AXES.points()]
    beyond = AXES.beyond()
    assert (beyond.hidden, beyond.intermediate) == (128, 32)
    assert AXES._replace(hidden=(64,)).beyond() == Sizes(2, 64, 64, 1)
    off = differences(extrapolated(found, AXES, beyond), {"up": kernel(instruction("ld", "global", sectors=128**2))})
    assert list(off) == ["sectors"]
    assert off["sectors"] > 0.1
    found[1] = {"up": kernel(instruction("ld.v4", "global"))}
    with pytest.raises(RuntimeError, match=r"^up: must be compiled to the same text in all slices$"):
        extrapolated(found, AXES, LAYER)


def test_sums_and_multiples_of_launches() -> None:
    own = kernel(instruction("add.s32", "integer", warps=3, bytes=5), read=32, written=64, programs=2)
    assert added(own, own) == times(own, Fraction(2))
    assert added(own, own).instructions[0].bytes == 10
    assert (added(own, own).read, added(own, own).written, added(own, own).programs) == (64, 128, 4)


def test_bounds_by_hand() -> None:
    """One instruction of each kind; 108 multiprocessors at 1.41 GHz."""
    counts = kernel(
        instruction(MMA, "tensor", warps=1000),
        instruction("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "tensor", warps=500),
        instruction("mov.b32", "move", warps=10**6),
        instruction("ld.param.b32", "parameter", warps=10**6),
        instruction("ld.global.b8", "global", warps=300, sectors=900, ideal_sectors=100),
        instruction("cp.async.ca.shared.global", "copy", warps=10, sectors=70, ideal_sectors=60, wavefronts=40),
        instruction("cp.async.cg.shared.global", "copy", warps=10, sectors=50, ideal_sectors=30),
        instruction("st.global.b32", "global", warps=80, sectors=20, ideal_sectors=10),
        read=10**6,
        written=39000,
    )
    assert issued(counts) == 1900
    assert l2_bytes(counts) == 32 * (100 + 60 + 50 + 20)
    found = bounds(counts, A100)
    assert found["issue"] == 1900 / (108 * 4 * 1.41e9)
    assert found["tensor"] == pytest.approx(2 * 16 * 8 * (16 * 1000 / 312e12 + 8 * 500 / 156e12))
    assert found["shared"] == 40 / (108 * 1.41e9)
    assert found["l2"] == 32 * 230 / 5.41e12
    assert found["dram"] == 1.039e6 / 2.039e12
    assert bound_by(found) == "dram"


@pytest.mark.parametrize(("name", "each"), [("a100", 2048), ("h100", 4096), ("h200", 4096), ("rtx4090", 512)])
def test_rates_agree(name: str, each: int) -> None:
    """Operations of a multiprocessor in a clock, of 16-bit numbers into fp32, and half as many of TF32."""
    card = CARDS[name]
    expected = card.multiprocessors * card.clock * each
    assert card.tensor["bf16"] == pytest.approx(expected, rel=1e-3)
    assert card.tensor["tf32"] == card.tensor["bf16"] / 2
    assert card.dram < card.l2 < 128 * card.wavefronts
    assert card.name == name


def made_layer(backward: bool = True, tokens: int = 128) -> LayerCounts:
    source = "standard.py:3:3 @[ products.py:9:1 @[ products.py:2:2 ] ]"
    some = kernel(
        instruction(MMA, "tensor", warps=100),
        instruction("st.shared.b32", "shared", source, warps=50, wavefronts=400, ideal_wavefronts=50),
        instruction("st.shared.b32", "shared", "tiles.py:3:1", warps=50, wavefronts=50, ideal_wavefronts=50),
        instruction("add.s32", "integer", warps=200),
        read=32,
    )
    few = kernel(instruction("bar.sync", "barrier", warps=8), instruction("add.s32", "integer", warps=8))
    plan = CountPlan(LAYERS["qwen3-30b-a3b"], tokens, torch.bfloat16, "nf4", backward, A100)
    slices = [Sizes(16, 256, 256, 1), Sizes(32, 256, 256, 1)]
    return LayerCounts(plan, {"up": some, "route": few}, slices, Sizes(16, 512, 512, 1), {"sectors": 0.1})


def test_what_is_printed() -> None:
    found = made_layer(tokens=130)
    assert report.heading(found)[1:] == [
        "128 experts, 8 rows of each, T=128 (for T=130); rates: A100 SXM 80 GB",
        "executed, ExHxI: 16x256x256, 32x256x256",
        "foretold from them and executed too: 16x512x512: every count is the same, but sectors 10%",
    ]
    assert report.heading(replace(found, differences={}))[-1].endswith(": every count is the same")
    assert report.heading(replace(found, beyond=None))[-1].startswith("executed, ExHxI")
    assert report.losses(found) == ["up: shared memory 4.5 times the fewest; 100% of it at products.py:9"]
    assert report.notable(found) == ["up"]
    times_two = {label: times(own, Fraction(2 if label == "route" else 1)) for label, own in found.kernels.items()}
    assert report.notable(replace(found, kernels=times_two)) == ["up", "route"]
    columns = {str(column.header): list(column.cells) for column in report.table(found).columns}
    assert columns["kernel"] == ["up", "route"]
    assert (columns["/mma"], columns["int"]) == (["4.0", ""], ["50%", "50%"])
    assert (columns["banks"], columns["sectors"], columns["bar"]) == (["4.50", ""], ["", ""], ["0", "2"])
    assert columns["bound by"] == ["shared", "issue"]
    large = replace(found, kernels={"up": replace(found.kernels["up"], read=1_234_567_890)})
    assert [*report.table(large).columns[5].cells] == ["1235"]


def test_the_picture(tmp_path: Path) -> None:
    plot.plot(tmp_path / "counts.png", made_layer(), "made up")
    assert (tmp_path / "counts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("hidden", "values"), [(160, (160,)), (256, (256,)), (384, (128, 256)), (400, (144, 272)), (2048, (128, 256))]
)
def test_a_small_layer_is_executed_as_it_is(hidden: int, values: tuple[int, ...]) -> None:
    shape = replace(LAYERS["qwen3-30b-a3b"], hidden=hidden)
    assert CountPlan(shape, 3200, torch.bfloat16, "", False, A100).axes().hidden == values


@pytest.mark.parametrize(
    ("tokens", "active", "rows", "counted"),
    [(1, 8, 1, 1), (16, 128, 1, 16), (100, 128, 6, 96), (110, 128, 7, 112), (3200, 128, 200, 3200)],
)
def test_rows_of_a_call(tokens: int, active: int, rows: int, counted: int) -> None:
    plan = CountPlan(LAYERS["qwen3-30b-a3b"], tokens, torch.bfloat16, "", False, A100)
    assert (plan.active, plan.rows, plan.counted_tokens) == (active, rows, counted)
    for axis, size in zip(plan.axes(), plan.sizes, strict=True):
        assert len(axis) == 1 or axis[0] < axis[1] <= size
    hidden, intermediate = plan.axes()[1:3]
    assert all((2048 - own) % 128 == 0 for own in hidden)
    assert all((768 - own) % 128 == 0 for own in intermediate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--execute", "none"], "--execute none: must be one of gpt-oss-20b, qwen3-30b-a3b,"),
        (["--execute", "bundled", "--target", "sm90"], "--target: must be left out with --execute"),
        (["--execute", "bundled", "--dtype", "all"], "--dtype all: must be one of bfloat16, float16, float32"),
        (
            ["--execute", "bundled", "--dtype", "float16", "--dtype", "float32"],
            "--dtype: must be given once with --execute",
        ),
        (["--execute", "bundled", "--packed", "int4"], "--packed int4: must be one of nf4, nf4-nested, fp4, mxfp4"),
        (["--execute", "bundled", "--direction", "back"], "--direction back: must be one of forward, forward_backward"),
        (["--execute", "bundled", "--card", "v100"], "--card v100: must be one of a100, h100, h200, rtx4090"),
        (["--execute", "bundled", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (
            ["--execute", "bundled", "--tokens", "9000"],
            "--tokens 9000: must be at most 8192 for bundled, 1024 rows of an expert",
        ),
        (
            ["--execute", "bundled", "--tokens", "7", "--direction", "forward_backward"],
            "--tokens 7: must be at least 8 for bundled with backward",
        ),
        (["--execute", "bundled", "--plot", "none/p.png"], "--plot none/p.png: must be in a folder that exists"),
        (["--tokens", "8"], "--tokens: must be left out without --execute"),
        (["--card", "h100"], "--card: must be left out without --execute"),
    ],
)
def test_refusals(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRETED", False)
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRETED", True)
    result = CliRunner().invoke(app, ["kernels", "--execute", "bundled"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: TRITON_INTERPRET=1: must be unset")
