"""Peak memory of the benchmark's contenders. Small layers."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from executors._bench import memory as bench_memory
from executors._bench.case import BenchCase, BenchRow
from executors._bench.ceilings import Ceilings
from executors._bench.everyone import contenders
from executors._bench.layers import BenchLayer, random_layer, sized, with_adapters
from executors._bench.peers.bitsandbytes import STACK
from executors._bench.quantised import BLOCKSIZE, Quantisation, quantised
from executors._bench.routing import Load, batch
from executors._cli.app import app
from moe_ref.conformance.judgement.faults import Judgement

pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN, NESTED, MX = Quantisation("nf4"), Quantisation("nf4", nested=True), Quantisation("mxfp4")


def layer_of(name: str, how: Quantisation, rank: int = 0) -> BenchLayer:
    dense = random_layer(sized(name, 32, "cpu", BLOCKSIZE), "cpu", 0, lambda *_: None)
    layer = quantised(dense, how, lambda *_: None)
    return with_adapters(layer, rank, 0) if rank else layer


@pytest.mark.parametrize(("how", "rank"), [(PLAIN, 0), (NESTED, 4), (MX, 4)], ids=str)
def test_layer_reaches_the_other_process_unchanged(tmp_path: Path, how: Quantisation, rank: int) -> None:
    layer = layer_of("gpt-oss-20b", how, rank)
    spec = json.loads(json.dumps(bench_memory._save(layer, tmp_path / "file")))
    found = bench_memory._load(tmp_path / "file", spec | {"device": "cpu"})
    assert (found.shape, found.storage) == (layer.shape, layer.storage)
    assert found.parameters.keys() == layer.parameters.keys()
    given = batch("real", 6, 4, layer.shape, "cpu", 0)
    for ours, theirs in zip(*(contenders(o, given, ["grouped_nf4"]) for o in (layer, found)), strict=True):
        if ours.call is not None and theirs.call is not None:
            assert torch.equal(ours.call(given), theirs.call(given)), ours.name


@pytest.mark.nightly
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    layer = layer_of("mixtral-8x7b", PLAIN)
    rows = [
        BenchRow(name, name == "grouped_nf4", judgement=Judgement(), seconds=[1.0]) for name in ("grouped_nf4", STACK)
    ]
    case = BenchCase(layer.shape, 4, "real", "forward", Load(1.0, 0, 1.0), 8, rows, storage=layer.storage, stack=STACK)
    told: list[str] = []
    bench_memory.add_peaks(layer, [case], device="cpu", seed=0, rank=0, tell=told.append)
    ours, stack = rows
    assert told == [f"memory of {row.name}" for row in rows]
    assert ours.peak is not None
    assert stack.peak is not None
    whole = case.decoded()[1]
    assert 0 < ours.peak < whole
    assert 0.9 * whole < stack.peak < 2 * whole


def test_memory_of_dense_weights_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "_in_a_process", lambda spec, name: "not here")
    monkeypatch.setattr("executors._bench.run.measure_ceilings", lambda _: Ceilings(0.5, 30.0, 40.0))
    small = ("--scale", 32, "--tokens", 4, "--seconds", 0.0, "--direction", "forward", "--routing", "real")
    arguments = ["bench", "--out", tmp_path, *small, "--memory", "--executor", "native"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert "native: memory" not in result.stdout
    assert "native memory not measured (qwen3-30b-a3b): not here" in result.stdout
