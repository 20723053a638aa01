"""On a GPU: the benchmark on a small layer, its clock, and what it counts."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from executors._bench import cuda as bench_cuda
from executors._cli.app import app

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_bench_on_a_gpu(tmp_path: Path) -> None:
    """Judged, timed, in a graph too; launches and memory are told."""
    small = (
        "--scale",
        32,
        "--tokens",
        3,
        "--tokens",
        200,
        "--seconds",
        0.0,
        "--routing",
        "real",
        "--layer",
        "mixtral-8x7b",
    )
    arguments = ("bench", "--out", tmp_path, "--device", "cuda", *small)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert (tmp_path / "roofline.png").exists()
    for case in cases:
        triton = next(row for row in case["contenders"] if row["name"] == "triton")
        assert triton["reason"] in ("", "forward only")
        if not triton["reason"]:
            assert len(triton["seconds"]) >= 7
            assert triton["launches"] >= 4
            assert triton["peak_bytes"] > 0
            assert bool(triton.get("graph", {}).get("seconds")) == (case["T"] <= 64 and case["direction"] == "forward")


def test_clock_measures_the_gpu_s_own_time() -> None:
    left = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    clock = bench_cuda.ColdClock("cuda", queued=True)

    def median(count: int) -> float:
        def action() -> None:
            for _ in range(count):
                torch.mm(left, left)

        action()
        replay = bench_cuda.captured(action, "cuda")
        return statistics.median(clock(replay) for _ in range(9))

    assert 8 < median(16) / median(1) < 24


def test_waiting_calls_are_not_captured() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(bench_cuda.NotCaptured, match="waits for the GPU"):
        bench_cuda.captured(lambda: print(x.sum().item()), "cuda")


def test_launches_are_counted() -> None:
    x = torch.ones(3, device="cuda")

    def action() -> None:
        for _ in range(3):
            x.add_(1)
        x.clone()  # a copy

    assert bench_cuda.launches(action, "cuda") == 3
