"""liger-kernel as a peer of the benchmark: which layers it takes, and how it is called. It need not be installed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executors._bench.layers import LAYERS, BenchLayer, random_layer, sized
from executors._bench.peers import liger as bench_liger
from executors._bench.routing import batch

pytestmark = pytest.mark.usefixtures("one_thread")


def layer_of(name: str) -> BenchLayer:
    return random_layer(sized(name, 128, "cpu"), "cpu", 0, lambda *_: None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gpt-oss-20b", "it has swiglu only, without clamp and offset"), ("qwen3-30b-a3b", ""), ("deepseek-v3", "")],
)
def test_liger_takes_what_it_can_compute(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_liger, "liger_version", lambda: "0.8")
    layer = layer_of(name)
    assert bench_liger._refusal(layer) == reason
    biased = replace(layer, shape=replace(LAYERS["mixtral-8x7b"], biases=True))
    assert bench_liger._refusal(biased) == "it has no biases"
    transposed = replace(layer, shape=replace(LAYERS["mixtral-8x7b"], transposed=True))
    assert bench_liger._refusal(transposed) == "it would copy transposed stacks in every call"
    monkeypatch.setattr(bench_liger, "liger_version", lambda: None)
    assert bench_liger._refusal(layer) == "liger-kernel is not installed"
    assert bench_liger.liger_peers(layer) == []  # on a CPU


def test_liger_is_called_as_its_signature_says_and_tuned_with_many_tokens() -> None:
    layer = layer_of("mixtral-8x7b")
    given = batch("real", 3, 2, layer.shape, "cpu", 0)
    calls: list[tuple[Any, ...]] = []

    def apply(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor) -> Any:
        calls.append((x.shape[0], torch.is_grad_enabled()))
        assert ids.dtype == torch.int32
        assert up.shape[1] == 2 * down.shape[2]
        return x * slot.sum() * up.sum() * down.sum()

    peer = bench_liger.peer(layer, SimpleNamespace(apply=apply))
    assert not peer.ours
    assert peer.call is not None
    assert peer.call(given).shape == given.x.shape
    assert peer.prepare is not None
    peer.prepare()
    assert calls == [(3, True), (4096, False), (4096, True)]
    assert all(leaf.grad is None for leaf in layer.parameters.values())
