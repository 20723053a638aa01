"""What the benchmark does on a GPU, as far as no GPU is needed to test it; test_bench_cuda.py has the rest."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from executors._bench import cuda as bench_cuda
from executors._bench import measure as bench_measure
from executors._bench import report
from executors._bench import roofline as bench_roofline
from executors._bench import run as bench
from executors._bench import table as bench_table
from executors._bench import timing as bench_timing
from executors._bench.case import BenchCase, BenchRow
from executors._bench.ceilings import Ceilings
from executors._bench.judge import judge_contender
from executors._bench.layers import LAYERS, BenchLayer, random_layer, sized
from executors._bench.measure import seconds_of
from executors._bench.routing import Batch, Load, batch
from executors._bench.settings import Settings
from executors._bench.timing import Timing, time_case
from executors._cli.app import app
from moe_ref.conformance.judgement.faults import Judgement
from moe_ref.conformance.judgement.gates import Verdict

pytestmark = pytest.mark.usefixtures("one_thread")

CEILINGS = Ceilings(800.0, 4000.0, 3000.0)
RIGHT = Judgement(verdicts=(Verdict("y", 1.5),))
SMALL = ("--scale", 32, "--tokens", 3, "--seconds", 0.0, "--routing", "real", "--layer", "mixtral-8x7b")


def run(out: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in ("bench", "--out", out, *arguments)])


def layer_of(name: str) -> BenchLayer:
    return random_layer(sized(name, 128, "cpu"), "cpu", 0, lambda *_: None)


def case_of(rows: list[BenchRow], tokens: int = 8, direction: str = "forward") -> BenchCase:
    return BenchCase(LAYERS["qwen3-30b-a3b"], tokens, "real", direction, Load(1.0, 0, 1.0), 64, rows, gpu=True)


def row(name: str, seconds: list[float], **fields: Any) -> BenchRow:
    return BenchRow(name, ":" not in name, judgement=RIGHT, seconds=seconds, **fields)


def gpu_cases() -> list[BenchCase]:
    """As a GPU would have them."""
    milliseconds = [1e-3, 1.1e-3, 1.2e-3]
    triton = row("triton", milliseconds, graph=[5e-4] * 3, launches=5, peak=2**20)
    peer = row("hf:grouped_mm", [2e-3] * 3, graph=[1e-3] * 3, launches=31, peak=3 * 2**20)
    loop = row("hf:eager", milliseconds, no_graph="waits for the GPU: item", launches=1234, peak=2**30)
    slow = replace(row("hf:batched_mm", []), untimed="a call took 2.0 s, more than 1 s")
    decode = case_of([triton, peer, loop, slow])
    decode.reference, decode.again = "hf:grouped_mm", [2e-3] * 3
    return [decode, case_of([row("triton", milliseconds, launches=11, peak=0)], 32768, "forward_backward")]


def test_kernels_are_told_from_copies_and_from_the_host() -> None:
    def event(device: str, name: str, annotation: bool = False) -> Any:
        return SimpleNamespace(device_type=SimpleNamespace(name=device), name=name, is_user_annotation=annotation)

    copies = [event("CUDA", "Memcpy DtoD (Device -> Device)"), event("CUDA", "Memset (Device)")]
    others = [event("CPU", "cudaLaunchKernel"), event("CUDA", "step", annotation=True)]
    assert bench_cuda.kernels([*copies, *others, event("CUDA", "up_kernel"), event("CUDA", "up_kernel")]) == 2


class Gpu:
    """Stands in for a GPU: what is called, in order."""

    def __init__(self, patch: pytest.MonkeyPatch, slow: str = "") -> None:
        self.calls: list[str] = []
        self.slow = slow
        patch.setattr(bench_cuda, "ColdClock", self.clock)
        patch.setattr(bench_cuda, "captured", self.captured)
        patch.setattr(bench_timing, "peak_of", lambda action, after, device: 1000)
        patch.setattr(bench_measure, "seconds_of", lambda action, device: self.seconds(action))

    def seconds(self, action: Any) -> float:
        action()
        return 2.0 if self.calls[-1] == self.slow else 1e-3

    def clock(self, device: str, queued: bool = False) -> Any:
        assert device == "cuda"

        def told(action: Any) -> float:
            action()
            return 1e-4 if queued else 2e-4

        return told

    def captured(self, action: Any, device: str, after: Any) -> Any:
        action()
        after()
        if self.calls[-1] == "hf:loop":
            raise bench_cuda.NotCaptured("waits for the GPU")
        return lambda: self.calls.append("replayed")

    def measure(self, names: list[str], tokens: int, direction: str, graphs: bool = True) -> dict[str, BenchRow]:
        case = case_of([row(name, []) for name in names], tokens, direction)
        actions = {name: lambda name=name: self.calls.append(name) for name in names}
        timing = Timing("cuda", 0.0, memory=True, graphs=graphs)
        time_case(case, actions, timing, lambda: None, lambda _: None)  # type: ignore[arg-type]
        return {found.name: found for found in case.rows}


def test_decoding_steps_are_timed_in_a_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    found = gpu.measure(["triton", "hf:loop"], 64, "forward")
    assert found["triton"].seconds == [2e-4] * 7
    assert found["triton"].graph == [1e-4] * 7
    assert found["triton"].peak == 1000
    assert (found["hf:loop"].graph, found["hf:loop"].no_graph) == ([], "waits for the GPU")
    assert gpu.calls.count("replayed") == 7
    for tokens, direction in ((65, "forward"), (64, "forward_backward")):
        larger = gpu.measure(["triton"], tokens, direction)["triton"]
        assert (larger.graph, larger.no_graph, len(larger.seconds)) == ([], "", 7)
    training = gpu.measure(["triton"], 4096, "lora")["triton"]
    assert training.graph == [1e-4] * 7
    assert gpu.measure(["triton"], 64, "forward", graphs=False)["triton"].graph == []


def test_a_contender_that_takes_seconds_is_left_out_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, slow="hf:loop")
    found = gpu.measure(["triton", "hf:loop"], 4096, "forward_backward")
    assert found["hf:loop"].untimed == "a call took 2.0 s, more than 1 s"
    assert gpu.calls.count("hf:loop") == 1
    assert found["triton"].seconds
    assert not found["hf:loop"].seconds


@pytest.mark.usefixtures("known_ceilings")
def test_launches_are_counted_of_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def launches(action: Any, device: str) -> int:
        action()
        counted.append(device)
        return 7

    monkeypatch.setattr(bench, "launches", launches)
    small = Settings(("native",), ("mixtral-8x7b",), (3,), ("real",), scale=64, seconds=0.0, rounds=1)
    small = replace(small, without=("kt-kernel",))  # which is not installed everywhere
    found = bench.run(small, lambda *_: None, lambda _: None)
    assert not counted
    rows = [row for case in found.cases for row in case.rows]
    rows[1].seconds = []  # was too slow
    bench._add_launches(small, found, lambda *_: None)
    assert len(rows) == 2 * 4
    assert [row.launches for row in rows] == [7 if row.seconds else None for row in rows]
    assert len(counted) >= 6


@pytest.mark.parametrize(("direction", "calls_of_a_round"), [("forward", 1), ("forward_backward", 2), ("lora", 2)])
def test_quick_calls_with_backward_are_made_twice(direction: str, calls_of_a_round: int) -> None:
    """On a CPU: memory that gradients stood in is warm then, as in training."""
    calls: list[str] = []
    case = replace(case_of([row("hf:eager", [])], direction=direction), gpu=False)
    actions = {"hf:eager": lambda: calls.append("hf:eager")}
    time_case(case, actions, Timing("cpu", 0.0), lambda: None, lambda _: None)
    assert len(calls) == 1 + calls_of_a_round * (7 + 7)


def test_interpreted_executor_is_run_once_and_compared_with_nobody() -> None:
    calls: list[str] = []
    case = replace(case_of([replace(row("triton", []), interpreted=True), row("hf:eager", [])]), gpu=False)
    actions = {r.name: lambda name=r.name: calls.append(name) for r in case.rows}
    time_case(case, actions, Timing("cpu", 0.0), lambda: None, lambda _: None)  # type: ignore[arg-type]
    assert calls.count("triton") == 1
    assert calls.count("hf:eager") == 1 + 7 + 7
    assert case.reference == "hf:eager"
    assert case.ratio(case.rows[0]) is None
    alone = replace(case_of([replace(row("triton", []), interpreted=True)]), gpu=False)
    time_case(alone, {"triton": actions["triton"]}, Timing("cpu", 0.0), lambda: None, lambda _: None)  # type: ignore[dict-item]
    assert (alone.reference, alone.again) == ("", [])


def test_table_and_json_of_a_gpu() -> None:
    from rich.console import Console

    cases = gpu_cases()
    console = Console(width=80, record=True, file=io.StringIO())
    for _, table in bench_table.tables(cases, CEILINGS):
        console.print(table)
    text = console.export_text()
    assert "in a graph" in text
    assert "…" not in text
    assert "slow" in text
    (line,) = [line for line in text.splitlines() if "hf:eager" in line]
    assert line.split()[-2:] == ["1234", "1024"]
    notes = report.notes(cases)
    assert "hf:eager not captured in a graph (qwen3-30b-a3b, forward): waits for the GPU: item" in notes
    assert "hf:batched_mm not timed (qwen3-30b-a3b, forward): a call took 2.0 s, more than 1 s" in notes
    (triton, *_) = report._case(cases[0], CEILINGS)["contenders"]
    assert triton["graph"]["times_best"]["median"] == 2.0
    assert triton["graph"]["gbs"] == pytest.approx(cases[0].bytes_moved / 5e-4 / 1e9)
    assert triton["graph"]["of_copy"] == pytest.approx(triton["graph"]["gbs"] / 4000)
    assert triton["of_copy"] == pytest.approx(triton["gbs"] / 4000)
    assert triton["of_bandwidth"] == pytest.approx(triton["gbs"] / 4000)
    assert json.dumps(triton)


def test_picture_of_a_gpu(tmp_path: Path) -> None:
    bench_roofline.plot(tmp_path / "roofline.png", gpu_cases(), CEILINGS, "a GPU")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["roofline.png"]


def test_roof_is_the_lower_of_the_two() -> None:
    assert CEILINGS.attainable(flops=1e12, size=1e12) == 4.0
    assert CEILINGS.attainable(flops=1e15, size=1e9) == 800.0


@pytest.mark.usefixtures("known_ceilings")
def test_nothing_is_begun_after_the_limit(tmp_path: Path) -> None:
    result = run(tmp_path, *SMALL, "--limit", 0)
    assert result.exit_code == 0, result.output
    assert "mixtral-8x7b: cases left out, the limit of 0 s had passed" in result.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["cases"] == []
    assert len(found["left_out"]) == 1


@pytest.mark.usefixtures("known_ceilings")
def test_the_limit_holds_within_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    measure = bench.measure_case

    def takes_a_minute(*arguments: Any) -> BenchCase:
        now[0] += 60
        return measure(*arguments)

    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(bench, "measure_case", takes_a_minute)
    some = Settings(("native",), ("mixtral-8x7b", "qwen3-30b-a3b"), (1, 3), ("real",), scale=64, seconds=0.0, limit=90)
    found = bench.run(some, lambda *_: None, lambda _: None)
    assert [(case.shape.name, case.tokens) for case in found.cases] == [("mixtral-8x7b", 1), ("mixtral-8x7b", 3)]
    assert [line.partition(":")[0] for line in found.left_out] == ["mixtral-8x7b", "qwen3-30b-a3b"]
    assert found.complete


@pytest.mark.usefixtures("known_ceilings")
def test_what_was_measured_outlives_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench.measure_case
    seen: list[BenchCase] = []

    def ended(*arguments: Any) -> BenchCase:
        if seen:
            raise KeyboardInterrupt
        seen.append(measure(*arguments))
        return seen[0]

    monkeypatch.setattr(bench, "measure_case", ended)
    assert run(tmp_path, *SMALL, "--executor", "native").exit_code != 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert not found["complete"]
    assert [case["direction"] for case in found["cases"]] == ["forward"]


@pytest.mark.usefixtures("known_ceilings")
def test_layer_that_does_not_fit_is_left_out_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> BenchLayer:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22 GiB.\nmore")

    monkeypatch.setattr(bench, "make_layer", too_large)
    result = run(tmp_path, *SMALL)
    assert result.exit_code == 0, result.output
    (line,) = json.loads((tmp_path / "bench.json").read_text())["left_out"]
    assert line == "mixtral-8x7b: left out, not enough memory: CUDA out of memory. Tried to allocate 22 GiB."


def test_call_that_does_not_fit_is_a_reason_and_no_fault() -> None:
    def too_large(_: Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    layer = layer_of("mixtral-8x7b")
    given = batch("real", 3, 2, layer.shape, "cpu", 0)
    judgement = judge_contender(too_large, layer, given, None, False)  # type: ignore[arg-type]
    assert judgement.reason == "not enough memory: CUDA out of memory."
    assert not judgement.fault


def test_seconds_of_a_call_on_a_cpu() -> None:
    assert 0 < seconds_of(lambda: None, "cpu") < 1


@pytest.mark.parametrize(("fastest", "slower", "limit"), [(0.5, 2.5, "2"), (3.0, 6.5, "6")])
def test_a_cpu_leaves_out_what_is_slow_beside_the_best_peer(
    fastest: float, slower: float, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without 16-bit products calls take minutes there: the best peer is timed however long, those far from it not."""
    times = {"native": 0.25, "hf:grouped_mm": fastest, "hf:eager": slower}
    monkeypatch.setattr(bench_timing, "warm_up", lambda actions, after, device: {n: times[n] for n in actions})
    case = case_of([row(name, []) for name in times])
    actions = dict.fromkeys(times, lambda: None)
    time_case(case, actions, Timing("cpu", 0.0), lambda: None, lambda _: None)
    found = {row.name: row for row in case.rows}
    assert found["hf:eager"].untimed == f"a call took {slower:.1f} s, more than {limit} s"
    assert found["native"].seconds
    assert found["hf:grouped_mm"].seconds
    assert case.reference == "hf:grouped_mm"
