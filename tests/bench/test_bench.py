"""The benchmark: who takes part, what is judged, what is written. Small layers, and no timed assertion."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import executors
from executors._bench import measure, report
from executors._bench.case import BenchCase, BenchRow
from executors._bench.contenders import our_contenders
from executors._bench.judge import judge_contender
from executors._bench.layers import LAYERS, BenchLayer, random_layer, sized
from executors._bench.measure import Spread, is_no_result, ratios, spread, time_rounds, warm_seconds
from executors._bench.peers.transformers import experts_module, peers
from executors._bench.routing import KINDS, Batch, Load, batch, load
from executors._bench.settings import Settings
from executors._bench.truth import sample_truth
from executors._cli.app import app
from moe_ref import routed_experts
from moe_ref.conformance.judgement.faults import Judgement
from moe_ref.conformance.judgement.gates import Verdict
from refusals import demand_one_line

pytestmark = pytest.mark.usefixtures("one_thread", "known_ceilings")

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--scale", 32, "--tokens", 1, "--tokens", 4, "--seconds", 0.0)
MIXTRAL = ("--routing", "real", "--layer", "mixtral-8x7b")


def layer_of(name: str) -> BenchLayer:
    return random_layer(sized(name, 32, "cpu"), "cpu", 0, lambda *_: None)


def bench(out: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in ("bench", "--out", out, *arguments)])


def case_of(rows: list[BenchRow], again: list[float] | None = None, **changes: Any) -> BenchCase:
    case = BenchCase(
        LAYERS["qwen3-30b-a3b"], 8, "real", "forward", Load(1.0, 0, 1.0), 64, rows, rows[-1].name, again or []
    )
    return replace(case, **changes)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["real", "skewed"])
def test_peers_and_executors_agree_with_the_specification(name: str, kind: str) -> None:
    pytest.importorskip("transformers")
    layer = layer_of(name)
    given = batch(kind, 6, 4, layer.shape, "cpu", 0)
    truth = sample_truth(layer, given, True, 0)
    contenders = our_contenders(layer, given, ["native"]) + peers(layer)
    assert len(contenders) == 4
    for contender in contenders:
        assert not contender.reason
        assert contender.call is not None
        judgement = judge_contender(contender.call, layer, given, truth, True)
        assert not judgement.failure, contender.name
        assert 0.1 < judgement.max_z < 6  # type: ignore[operator]
        assert len(judgement.verdicts) == 7 if layer.shape.biases else 5


@pytest.mark.parametrize("name", LAYERS)
def test_peers_agree_where_the_clamp_acts(name: str) -> None:
    pytest.importorskip("transformers")
    layer = layer_of(name)
    given = batch("uniform", 6, 4, layer.shape, "cpu", 0)
    given = replace(given, x=6 * given.x.detach())
    truth = sample_truth(layer, given, False, 0)
    for contender in peers(layer):
        assert contender.call is not None
        assert not judge_contender(contender.call, layer, given, truth, False).failure, contender.name


@pytest.mark.parametrize("name", LAYERS)
def test_truth_is_the_specification_s(name: str) -> None:
    layer = layer_of(name)
    given = batch("real", 9, 4, layer.shape, "cpu", 0)
    with torch.no_grad():
        y = routed_experts(given.x, given.topk_ids, given.topk_weights, layer.weights())
    exact = sample_truth(layer, given, False, 0).bars["y"].exact
    np.testing.assert_allclose(exact, y[given.judged].numpy(), rtol=0, atol=1e-12 * np.abs(exact).max())


def test_peers_work_on_the_layer_s_own_memory() -> None:
    pytest.importorskip("transformers")
    layer = layer_of("gpt-oss-20b")
    module = experts_module(layer, "eager")
    assert module.gate_up_proj.data_ptr() == layer.weights().gate_up_proj.data_ptr()
    assert layer.weights().gate_up_proj.shape == (32, 192, 96)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y.float(), "E3, T2"),
        (lambda y: y * torch.nan, "E2"),
        (lambda y: y * 1.2, "C1, E1, E2"),
        (lambda y: y.detach(), "raised RuntimeError"),
        (lambda y: y + y.roll(1, 0), "D1: the gradient of x is not 0"),
    ],
)
def test_wrong_results_are_found(spoil: Any, message: str) -> None:
    layer = layer_of("qwen3-30b-a3b")
    given = batch("real", 64, 4, layer.shape, "cpu", 0)
    truth = sample_truth(layer, given, True, 0)
    (native,) = our_contenders(layer, given, ["native"])
    assert native.call is not None
    call = native.call

    def spoiled(b: Batch) -> torch.Tensor:
        return spoil(call(b))

    assert judge_contender(spoiled, layer, given, truth, True).failure.startswith(message)
    assert all(leaf.grad is None for leaf in layer.parameters.values())


@pytest.mark.parametrize(("name", "skew"), [("gpt-oss-20b", 2.59), ("qwen3-30b-a3b", 4.0), ("mixtral-8x7b", 1.6)])
def test_routings_have_the_skew_they_say(name: str, skew: float) -> None:
    shape = sized(name, 32, "cpu")
    loads = {kind: load(batch(kind, 1024, 4, shape, "cpu", 0).topk_ids, shape) for kind in KINDS}
    assert loads["uniform"].max_over_mean < 1.6 < loads["skewed"].max_over_mean
    assert loads["uniform"].idle == 0
    assert loads["skewed"].busiest > 0.7
    assert abs(loads["real"].max_over_mean - skew) < 0.4
    assert loads["uniform"].max_over_mean < loads["real"].max_over_mean < loads["skewed"].max_over_mean


def test_real_routing_of_32_experts_is_the_bundled_layer_s() -> None:
    shape = sized("gpt-oss-20b", 32, "cpu")
    found = load(batch("real", 1024, 0, shape, "cpu", 5).topk_ids, shape)
    assert found.max_over_mean == 332 / 128
    assert found.idle == 3


def test_judged_tokens_are_the_same_for_every_number_of_tokens() -> None:
    shape = sized("qwen3-30b-a3b", 32, "cpu")
    small, large = (batch("real", tokens, 4, shape, "cpu", 0) for tokens in (4, 100))
    assert large.judged.tolist() == [0, 33, 66, 99]
    for name in ("x", "dy", "topk_ids", "topk_weights"):
        assert torch.equal(getattr(small, name), getattr(large, name)[large.judged])


def test_sizes() -> None:
    assert (sized("deepseek-v3", 1, "cpu").hidden, sized("deepseek-v3", 1, "cuda").hidden) == (1792, 7168)
    assert sized("gpt-oss-20b", 1, "cpu") == LAYERS["gpt-oss-20b"]
    assert sized("qwen3-30b-a3b", 32, "cpu").intermediate == 32
    qwen = LAYERS["qwen3-30b-a3b"]
    assert qwen.flops(3, False) == 2 * 24 * 2048 * 1536 + 2 * 24 * 768 * 2048
    assert qwen.flops(3, True) == 3 * qwen.flops(3, False)
    one = 3 * 2048 * 768
    assert qwen.bytes_moved(3, 24, False) == 2 * (24 * one + 2 * 3 * 2048)
    assert qwen.bytes_moved(3, 24, True) == 2 * (48 * one + 128 * one + 5 * 3 * 2048)


def test_spread_and_ratios() -> None:
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 1.4, 4.6)
    assert ratios([2.0, 3.0], [1.0, 6.0]) == [2.0, 0.5]
    control = Spread(1.0, 0.9, 1.05)
    assert is_no_result(Spread(1.1, 1.0, 1.2), control)  # 1 / 0.9 > 1.1
    assert is_no_result(Spread(0.95, 0.9, 1.0), control)
    assert not is_no_result(Spread(1.2, 1.1, 1.3), control)
    assert not is_no_result(Spread(0.5, 0.4, 3.0), control)


def test_case_compares_with_the_fastest_peer_round_by_round() -> None:
    right = Judgement(verdicts=(Verdict("y", 1.0),))
    native = BenchRow("native", True, judgement=right, seconds=[1.0, 2.0, 4.0])
    slow, fast = (BenchRow(n, False, judgement=right, seconds=s) for n, s in (("slow", [9.0] * 3), ("fast", [2.0] * 3)))
    case = case_of([native, slow, fast], [2.0, 1.0, 4.0])
    assert case.best_peer() is fast
    assert case.ratio(native) == Spread(1.0, 0.6, pytest.approx(1.8))
    control = case.control()
    assert control is not None
    assert (control.median, control.high) == (1.0, pytest.approx(1.8))
    assert case_of([native]).best_peer() is None
    assert case_of([native]).ratio(native) is None


def test_peers_may_round_elsewhere_but_executors_must_pass() -> None:
    wrong = Judgement(verdicts=(Verdict("y", 7.0, failure="max z 7.0"),))
    assert BenchRow("native", True, judgement=wrong).failed
    assert not BenchRow("peer", False, judgement=wrong).failed
    assert BenchRow("peer", False, judgement=Judgement(fault="raised")).failed


def test_rounds_take_turns() -> None:
    calls: list[str] = []
    times = time_rounds(
        {name: lambda name=name: calls.append(name) for name in "ab"},  # type: ignore[misc]
        lambda: calls.append("clear"),
        "cpu",
        0.0,
        0,
        lambda _: None,
    )
    assert {name: len(t) for name, t in times.items()} == {"a": 7, "b": 7}
    assert calls[1::2] == ["clear"] * 14
    assert all(set(calls[i : i + 4 : 2]) == {"a", "b"} for i in range(0, 28, 4))


def test_quick_calls_are_timed_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ones the first time, since twice would be long."""
    calls: list[str] = []
    taken = iter([0.5, 0.25, 3.0])

    def seconds(action: Callable[[], None], _device: str) -> float:
        action()
        return next(taken)

    monkeypatch.setattr(measure, "seconds_of", seconds)
    action, after = (lambda: calls.append("call")), (lambda: calls.append("clear"))
    assert warm_seconds(action, after) == 0.25
    assert calls == ["call", "clear", "call"]
    assert warm_seconds(action, after) == 3.0
    assert calls == ["call", "clear", "call", "call"]


def test_command_prints_tables_and_writes_everything(tmp_path: Path) -> None:
    result = bench(tmp_path, *SMALL, "--layer", "gpt-oss-20b")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    assert "\x1b" not in result.output
    assert "…" not in result.output
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["schema"] == 1
    assert {"processor", "threads", "torch"} <= found["machine"].keys()
    assert found["arguments"]["scale"] == 32
    assert found["ceilings"] == {"tflops": 0.5, "copy_gbs": 30.0, "read_gbs": 40.0, "product": "bf16"}
    cases = [(c["layer"], c["T"], c["routing"], c["direction"]) for c in found["cases"]]
    assert len(cases) == len(set(cases)) == 2 * 4
    for case in found["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        assert rows["native"]["passed"]
        timed = [row for row in rows.values() if row["seconds"]]
        for row in timed:
            assert len(row["seconds"]) == 7
            assert row["of_product"] == pytest.approx(row["tflops"] / 0.5)
            assert row["of_bandwidth"] == pytest.approx(row["gbs"] / 40)
            assert row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"]
        assert len(case["control"]["seconds"]) == 7
        assert case["load"]["max_over_mean"] >= 1


def test_without_transformers_only_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors._bench.peers.transformers.peers_version", lambda: None)
    monkeypatch.setattr(report, "peers_version", lambda: None)
    result = bench(tmp_path, *SMALL, "--routing", "real", "--direction", "forward", "--without", "kt-kernel")
    assert result.exit_code == 0, result.output
    assert "transformers is not installed: no peers" in " ".join(result.output.split())
    (first, _) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert first["best_peer"] is None
    assert all(row["ours"] for row in first["contenders"])


def test_wrong_executor_is_not_timed_and_gives_exit_status_1(tmp_path: Path, one_percent_more: str) -> None:
    result = bench(tmp_path, "--scale", 16, "--tokens", 4, "--seconds", 0.0, *MIXTRAL)
    assert result.exit_code == 1, result.output
    assert "FAIL" in result.output
    assert f"{one_percent_more} FAILED" in result.output
    for case in json.loads((tmp_path / "bench.json").read_text())["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        assert rows["native"]["passed"]
        assert not rows[one_percent_more]["seconds"]


def test_executor_that_cannot_run_stands_with_its_reason(tmp_path: Path) -> None:
    def needs_a_gpu() -> executors.Executor:
        raise executors.Unavailable("needs a GPU")

    executors.register("needs_a_gpu", needs_a_gpu)
    try:
        small = (*SMALL, "--routing", "real", "--direction", "forward")
        everyone, named = bench(tmp_path, *small), bench(tmp_path, *small, "--executor", "needs_a_gpu")
    finally:
        executors.unregister("needs_a_gpu")
    assert everyone.exit_code == 0, everyone.output
    assert "needs_a_gpu not run" in everyone.output
    assert "needs a GPU" in everyone.output
    assert named.exit_code == 1


def test_bad_arguments_exit_with_2_and_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    cases = [
        (("--layer", "gpt"), "--layer gpt: must be one of gpt-oss-20b, qwen3-30b-a3b, mixtral-8x7b, deepseek-v3"),
        (("--routing", "odd"), "--routing odd: must be one of real, uniform, skewed"),
        (("--direction", "back"), "--direction back: must be one of forward, forward_backward"),
        (("--executor", "nativ"), "--executor nativ: must be one of"),
        (
            ("--without", "native"),
            "--without native: must be one of hf:eager, hf:grouped_mm, hf:batched_mm, gnf4, kt-kernel",
        ),
        (("--device", "quantum"), "--device quantum: must be a device that torch has here"),
        (("--out", file), f"--out {file}: must be a folder that can be written"),
    ]
    demand_one_line(bench, tmp_path, cases)


def test_default_routings_are_all_forward_and_the_real_one_with_backward() -> None:
    settings = Settings(("native",))
    assert settings.pairs() == [
        ("real", "forward"),
        ("real", "forward_backward"),
        ("uniform", "forward"),
        ("skewed", "forward"),
    ]
    assert settings.cases() == 16
    assert len(replace(settings, routings=("skewed",)).pairs()) == 2
