"""grouped-nf4-gemm as a peer of the benchmark: what it takes, and how it is called. It need not be installed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from executors._bench.judge import judge_contender
from executors._bench.layers import BenchLayer, random_layer, sized, with_adapters
from executors._bench.peers import gnf4
from executors._bench.quantised import Quantisation, quantised
from executors._bench.routing import batch
from executors._bench.truth import sample_truth
from moe_ref import mxfp4, nf4
from moe_ref.types import MXFP4Tensor, NF4Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def layer_of(name: str, how: Quantisation) -> BenchLayer:
    dense = random_layer(sized(name, 256, "cpu", 64), "cpu", 0, lambda *_: None)
    return quantised(dense, how, lambda *_: None)


def multiplied(rows: Tensor, matrices: Tensor, sizes: list[int], own: list[int]) -> Tensor:
    parts = torch.split(rows, sizes)
    return torch.cat([part @ matrices[expert].to(rows.dtype).mT for part, expert in zip(parts, own, strict=True)])


def fused_grouped_lora(
    rows: Tensor, packed: Tensor, absmax: Tensor, sizes: list[int], own: list[int], a: Any, b: Any, *, scaling: float
) -> Tensor:
    """As its documentation has it."""
    experts, m, half = packed.shape
    assert absmax.shape == (experts, m, half // 32)
    assert min(sizes) > 0
    tensor = NF4Tensor(packed.flatten(), absmax.flatten(), shape=(experts, m, 2 * half), dtype="bfloat16")
    out = multiplied(rows, nf4.decode(tensor), sizes, own)
    return out if a is None else out + scaling * multiplied(multiplied(rows, a, sizes, own), b, sizes, own)


def gemm_mxfp4_grouped(rows: Tensor, blocks: Tensor, scales: Tensor, sizes: list[int], own: list[int]) -> Tensor:
    """As its documentation has it."""
    return multiplied(rows, mxfp4.decode(MXFP4Tensor(blocks.view(*scales.shape, 16), scales)), sizes, own)


@pytest.mark.parametrize(
    ("name", "how", "rank"),
    [("mixtral-8x7b", "nf4", 0), ("mixtral-8x7b", "nf4", 4), ("gpt-oss-20b", "mxfp4", 0)],
)
def test_it_is_called_as_its_signatures_say(name: str, how: Any, rank: int) -> None:
    layer = layer_of(name, Quantisation(how))
    layer = with_adapters(layer, rank, 0) if rank else layer
    given = batch("real", 5, 4, layer.shape, "cpu", 0)
    peer = gnf4.peer(layer, fused_grouped_lora if how == "nf4" else gemm_mxfp4_grouped)
    assert peer.call is not None
    assert peer.backward == (how == "nf4")
    judgement = judge_contender(peer.call, layer, given, sample_truth(layer, given, peer.backward, 0), peer.backward)
    assert not judgement.failure
    assert judgement.max_z < 6  # type: ignore[operator]


def test_it_takes_what_it_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, mx = (layer_of("mixtral-8x7b", Quantisation(how)) for how in ("nf4", "mxfp4"))  # type: ignore[arg-type]
    assert gnf4.gnf4_peers(layer) == []  # on a CPU
    monkeypatch.setattr(gnf4, "gnf4_version", lambda: "0.51.0")
    assert gnf4.refusal(layer) == gnf4.refusal(mx) == ""
    assert gnf4.refusal(with_adapters(mx, 4, 0)) == "it has MXFP4 without adapters"
    for other in (Quantisation("nf4", nested=True), Quantisation("fp4")):
        assert "with plain scales only" in gnf4.refusal(layer_of("mixtral-8x7b", other))
    turned = replace(layer, shape=replace(layer.shape, transposed=True))
    assert "that is summed over last only" in gnf4.refusal(turned)
    monkeypatch.setattr(gnf4, "gnf4_version", lambda: None)
    assert gnf4.refusal(layer) == "grouped-nf4-gemm is not installed"
