"""The benchmark in 4 bits: the same bytes for all, every contender right, memory measured. No timed assertion."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from executors._bench import memory as bench_memory
from executors._bench import report, variants
from executors._bench import table as bench_table
from executors._bench.case import BenchCase, BenchRow
from executors._bench.ceilings import Ceilings
from executors._bench.contenders import our_contenders
from executors._bench.everyone import contenders
from executors._bench.judge import judge_contender
from executors._bench.layers import LAYERS, BenchLayer, Storage, random_layer, sized, with_adapters
from executors._bench.measure import Spread
from executors._bench.peers import loops
from executors._bench.peers.bitsandbytes import NO_ADAPTERS, NO_MXFP4, STACK, parametrised_module, peers_in_4_bits
from executors._bench.quantised import BLOCKSIZE, Quantisation, quant_state, quantised
from executors._bench.routing import Load, batch
from executors._bench.settings import Settings
from executors._bench.truth import sample_truth
from executors._cli.app import app
from executors._cli.options import new_console
from moe_ref import mxfp4, nf4
from moe_ref.conformance.judgement.faults import Judgement
from moe_ref.layer import layer_vjp
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor
from refusals import demand_one_line

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread", "known_ceilings")

PEERS = ["bnb:loop", "bnb:sorted-loop", STACK, "hf:eager+bnb"]
TORCH_LOOPS = ["torch:loop", "torch:sorted-loop"]
PLAIN, NESTED, MX = Quantisation("nf4"), Quantisation("nf4", nested=True), Quantisation("mxfp4")
WAYS = [*variants.PATHS, "bf16"]
SMALL = ("--scale", 32, "--tokens", 1, "--tokens", 4, "--seconds", 0.0, "--executor", "grouped_nf4")


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("quantised", "peers.bitsandbytes", "report"):
        monkeypatch.setattr(f"executors._bench.{module}.bitsandbytes_version", lambda: None)


def dense_layer(name: str = "qwen3-30b-a3b") -> BenchLayer:
    return random_layer(sized(name, 32, "cpu", BLOCKSIZE), "cpu", 0, lambda *_: None)


def layer_of(name: str = "qwen3-30b-a3b", how: Quantisation = PLAIN, rank: int = 0) -> BenchLayer:
    layer = quantised(dense_layer(name), how, lambda *_: None)
    return with_adapters(layer, rank, 0) if rank else layer


def bench(out: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in ("bench", "--out", out, *arguments)])


def case_of(rows: list[BenchRow], **changes: Any) -> BenchCase:
    case = BenchCase(LAYERS["qwen3-30b-a3b"], 4, "real", "forward", Load(1.0, 0, 1.0), 24, rows, stack=STACK)
    return replace(case, storage=Storage(PLAIN.weight_bytes, frozen=True), **changes)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("how", [PLAIN, NESTED, Quantisation("fp4"), MX], ids=str)
@pytest.mark.parametrize("name", ["gpt-oss-20b", "qwen3-30b-a3b"])
def test_every_contender_agrees_with_the_specification(name: str, how: Quantisation, rank: int) -> None:
    layer = layer_of(name, how, rank)
    given = batch("real", 6, 4, layer.shape, "cpu", 0)
    truth = sample_truth(layer, given, True, 0)
    everyone = contenders(layer, given, ["grouped_nf4"])
    assert [c.name for c in everyone] == ["grouped_nf4", *(TORCH_LOOPS if how is MX else []), *PEERS]
    for contender in everyone:
        if how is MX and contender.name in PEERS:
            assert contender.reason == NO_MXFP4
            continue
        if rank and "hf:" in contender.name:
            assert contender.reason == NO_ADAPTERS
            continue
        assert not contender.reason
        assert contender.call is not None
        judgement = judge_contender(contender.call, layer, given, truth, True)
        assert not judgement.failure, contender.name
        assert 0.1 < judgement.max_z < 6  # type: ignore[operator]
        assert {v.name for v in judgement.verdicts} == {"y", "x", "topk_weights", *layer.parameters}


@pytest.mark.parametrize(("name", "how"), [("gpt-oss-20b", PLAIN), ("gpt-oss-20b", MX), ("qwen3-30b-a3b", PLAIN)])
def test_truth_is_the_specification_s(name: str, how: Quantisation) -> None:
    layer = layer_of(name, how, rank=4)
    given = batch("real", 9, 4, layer.shape, "cpu", 0)
    where = given.judged
    truth = sample_truth(layer, given, True, 0)
    x, slot_weights, dy = (t.detach()[where].double() for t in (given.x, given.topk_weights, given.dy))
    with torch.no_grad():
        y, gradients = layer_vjp(x, None, given.topk_ids[where], slot_weights, layer.weights(), dy)
    assert truth.bars.keys() == {"y", "x", "topk_weights", *layer.parameters}
    for name, bars in truth.bars.items():
        value = y if name == "y" else getattr(gradients, name)
        if name in truth.rows:
            value = value[truth.active][:, truth.rows[name]]
        np.testing.assert_allclose(bars.exact, value, rtol=0, atol=1e-12 * float(value.abs().max()))


@pytest.mark.parametrize("rank", [0, 4])
def test_wrong_bytes_are_found(rank: int) -> None:
    layer = layer_of(rank=rank)
    given = batch("real", 6, 4, layer.shape, "cpu", 0)
    truth = sample_truth(layer, given, False, 0)
    down = layer.frozen["down_proj"]
    assert isinstance(down, NF4Tensor)
    other = replace(layer, frozen=layer.frozen | {"down_proj": replace(down, absmax=down.absmax.roll(1))})
    for contender in contenders(other, given, ["grouped_nf4"]):
        if contender.call is not None:
            assert judge_contender(contender.call, layer, given, truth, False).failure, contender.name


def test_wrong_gradients_of_adapters_are_found() -> None:
    layer = layer_of(rank=4)
    given = batch("real", 6, 4, layer.shape, "cpu", 0)
    truth = sample_truth(layer, given, True, 0)
    other = replace(layer, parameters=dict(layer.parameters))
    factor = layer.parameters["down_lora_b"]
    with torch.no_grad():
        other.parameters["down_lora_b"] = torch.nn.Parameter(factor.clone())  # its gradient goes astray
    (ours, *_) = contenders(other, given, ["grouped_nf4"])
    assert ours.call is not None
    assert judge_contender(ours.call, layer, given, truth, True).failure == "D1: no gradient for down_lora_b"


@pytest.mark.parametrize("how", [PLAIN, NESTED], ids=str)
def test_bytes_are_those_of_the_whole_stack(how: Quantisation) -> None:
    stack = dense_layer().parameters["down_proj"].detach()
    tensor = layer_of(how=how).frozen["down_proj"]
    assert isinstance(tensor, NF4Tensor)
    packed, state = bitsandbytes.functional.quantize_4bit(
        stack, quant_type="nf4", blocksize=BLOCKSIZE, compress_statistics=how.nested
    )
    assert torch.equal(packed.view(-1), tensor.packed)
    assert torch.equal(state.absmax, tensor.absmax)
    decoded = bitsandbytes.functional.dequantize_4bit(tensor.packed[:, None], quant_state(tensor))
    assert torch.equal(decoded.float(), nf4.decode(tensor))
    if how.nested:
        assert torch.equal(state.state2.absmax, tensor.nested_absmax)


def test_peers_work_on_the_layer_s_own_memory() -> None:
    layer = layer_of("gpt-oss-20b")
    module = parametrised_module(layer, "grouped_mm")
    up = layer.frozen["gate_up_proj"]
    assert isinstance(up, NF4Tensor)
    assert module.parametrizations.gate_up_proj.original.data_ptr() == up.packed.data_ptr()
    assert layer.weights().gate_up_proj.transposed
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_mxfp4_keeps_the_numbers_in_checkpoints_order() -> None:
    """gpt-oss' dense stacks are stored as [E, k, m]; its blocks run along k, which is last in memory."""
    dense, layer = dense_layer("gpt-oss-20b"), layer_of("gpt-oss-20b", MX)
    assert dense.shape.transposed
    assert not layer.shape.transposed
    for name in ("gate_up_proj", "down_proj"):
        packed = layer.frozen[name]
        assert isinstance(packed, MXFP4Tensor)
        assert not packed.transposed
        expected = mxfp4.quantize(dense.parameters[name].detach().mT)
        assert torch.equal(packed.blocks, expected.blocks)
        assert torch.equal(packed.scales, expected.scales)
    assert (layer.storage.weight_bytes, str(MX)) == (0.5 + 1 / 32, "mxfp4, blocks of 32")


def small_layer(how: Quantisation, rank: int = 0) -> BenchLayer:
    """Of 8 experts: quick to interpret."""
    layer = quantised(random_layer(sized("mixtral-8x7b", 256, "cpu", BLOCKSIZE), "cpu", 0, lambda *_: None), how, print)
    return with_adapters(layer, rank, 0) if rank else layer


@pytest.mark.parametrize(("how", "rank"), [(NESTED, 0), (MX, 4)], ids=str)
def test_each_path_and_the_decoded_layer_are_contenders_of_their_own(how: Quantisation, rank: int) -> None:
    pytest.importorskip("triton")
    layer = small_layer(how, rank)
    given = batch("real", 3, 2, layer.shape, "cpu", 0)
    truth = sample_truth(layer, given, rank > 0, 0)
    everyone = our_contenders(layer, given, ["grouped_nf4", "triton[bf16]"], admit_interpreted=True)
    assert [c.name for c in everyone] == [*(f"grouped_nf4[{path}]" for path in variants.PATHS), "triton[bf16]"]
    assert [c.interpreted for c in everyone] == [True, True, False, True]
    for contender in everyone:
        assert contender.call is not None
        judgement = judge_contender(contender.call, layer, given, truth, rank > 0)
        assert not judgement.failure, contender.name
        assert judgement.max_z < 6  # type: ignore[operator]
    up = layer.frozen["gate_up_proj"]
    assert isinstance(up, PackedTensor)
    assert torch.equal(layer.decoded["gate_up_proj"].float(), (mxfp4 if how is MX else nf4).decode(up))  # type: ignore[arg-type]


def test_one_path_can_be_asked_for_and_alone_it_has_the_executor_s_name() -> None:
    layer = small_layer(PLAIN)
    given = batch("real", 3, 2, layer.shape, "cpu", 0)
    assert [c.name for c in our_contenders(layer, given, ["grouped_nf4"])] == ["grouped_nf4"]  # others: interpreted
    (asked,) = our_contenders(layer, given, ["grouped_nf4[torch]"])
    (plain,) = our_contenders(layer, given, ["grouped_nf4"])
    assert asked.call is not None
    assert plain.call is not None
    assert torch.equal(asked.call(given), plain.call(given))
    (fused,) = our_contenders(layer, given, ["grouped_nf4[fused]"])
    assert fused.reason


def test_the_told_loop_reads_sizes_once_for_a_batch() -> None:
    layer = small_layer(PLAIN)
    sizes = loops.Sizes(layer.shape.experts)
    first, second = (batch("real", tokens, 2, layer.shape, "cpu", 0) for tokens in (3, 5))
    told = sizes.told(first)
    assert sizes.told(first) is told
    assert sum(sizes.told(second)) == 2 * 5
    assert told == sizes.read(first)
    on_gpu, on_cpu = (loops.names_of("bnb:", torch.device(kind)) for kind in ("cuda", "cpu"))
    assert on_gpu == ["bnb:loop", "bnb:sorted-loop", "bnb:told-loop"]
    assert on_cpu == on_gpu[:2]


def test_tables_of_a_gpu_compare_with_bf16_in_80_columns() -> None:
    right, times = Judgement(), [1.234, 1.3, 1.35]

    def row(name: str, factor: float) -> BenchRow:
        ours = name.startswith(("grouped", "triton"))
        graph = [0.5 * factor * t for t in times]
        return BenchRow(name, ours, judgement=right, seconds=[factor * t for t in times], graph=graph, peak=123 * 2**20)

    names = [*(f"grouped_nf4[{path}]" for path in variants.PATHS), "triton[bf16]", "bnb:told-loop", STACK]
    rows = [row(name, factor) for name, factor in zip(names, (0.4, 1.0, 2.0, 1.0, 3.0, 40.0), strict=True)]
    case = case_of(rows, tokens=8192, gpu=True)
    case.reference, case.again = "bnb:told-loop", [3 * t for t in times]
    assert case.dense_ratio(rows[0]) == case.dense_graph_ratio(rows[0]) == Spread(*[pytest.approx(2.5)] * 3)
    assert case_of(rows[:3]).dense_ratio(rows[0]) is None
    ((_, table),) = bench_table.tables([case], Ceilings(800.0, 4000.0, 3000.0))
    console = new_console()
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for words in ("x bf16", "x stack", "grouped_nf4[decoded]", "2.50"):
        assert words in text


def test_without_bitsandbytes_we_quantise_and_the_peers_say_so(without_bitsandbytes: None) -> None:
    layer = layer_of()
    assert layer.weights().packed().keys() == {"gate_up_proj", "down_proj"}
    assert {p.name: p.reason for p in peers_in_4_bits(layer)} == dict.fromkeys(PEERS, "bitsandbytes is not installed")


def test_without_transformers_the_loops_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors._bench.peers.bitsandbytes.peers_version", lambda: None)
    reasons = {p.name: p.reason for p in peers_in_4_bits(layer_of())}
    assert list(reasons.values()) == ["", "", *["transformers is not installed"] * 2]


def test_loops_need_whole_nested_blocks_for_each_expert() -> None:
    small = sized("qwen3-30b-a3b", 128, "cpu")  # 16 x 16: no expert has 32 scales
    layer = quantised(random_layer(small, "cpu", 0, lambda *_: None), NESTED, lambda *_: None)
    assert peers_in_4_bits(layer)[0].reason == "8 scales for each expert: must be a multiple of 32"


def test_work_is_counted_in_the_form_in_which_weights_are_kept() -> None:
    qwen, one = LAYERS["qwen3-30b-a3b"], 3 * 2048 * 768
    frozen = Storage(PLAIN.weight_bytes, frozen=True)
    adapted = replace(frozen, rank=16)
    factors = 16 * (2 * 2048 + 3 * 768)
    assert (PLAIN.weight_bytes, NESTED.weight_bytes) == (0.5625, 0.5 + 1 / 64 + 4 / 64 / 256)
    assert qwen.flops(3, False, frozen) == 2 * 24 * one
    assert qwen.flops(3, True, frozen) == 2 * 2 * 24 * one
    assert qwen.flops(3, True, adapted) == 2 * 24 * (2 * one + 3 * factors)
    assert qwen.bytes_moved(3, 24, False, frozen) == 24 * one * 9 // 16 + 2 * 2 * 3 * 2048
    assert qwen.bytes_moved(3, 24, True, frozen) == 2 * 24 * one * 9 // 16 + 2 * 5 * 3 * 2048
    more = 2 * (2 * 24 + 128) * factors  # read twice, and all gradients written
    assert qwen.bytes_moved(3, 24, True, adapted) == qwen.bytes_moved(3, 24, True, frozen) + more
    assert case_of([]).decoded() == (2 * 24 * one, 2 * 128 * one)


def test_case_compares_with_the_parametrised_stack_and_with_the_best() -> None:
    right = Judgement()
    ours = BenchRow("grouped_nf4", True, judgement=right, seconds=[1.0, 1.0])
    fast, stack = (
        BenchRow(n, False, judgement=right, seconds=s) for n, s in (("bnb:loop", [2.0] * 2), (STACK, [8.0, 8.0]))
    )
    case = case_of([ours, fast, stack])
    assert case.best_peer() is fast
    assert (case.ratio(ours), case.stack_ratio(ours)) == (Spread(2.0, 2.0, 2.0), Spread(8.0, 8.0, 8.0))
    assert case_of([ours, fast]).stack_ratio(ours) is None


def test_notes_say_once_where_a_reason_holds() -> None:
    def case(direction: str, tokens: int, reason: str) -> BenchCase:
        return case_of([BenchRow("peer", False, reason=reason)], direction=direction, tokens=tokens)

    cases = [case("forward", 1, ""), case("forward", 8, "large"), case("lora", 1, "none"), case("lora", 8, "none")]
    assert report.notes(cases) == [
        "peer not run (qwen3-30b-a3b, T=8 forward): large",
        "peer not run (qwen3-30b-a3b, with adapters): none",
    ]
    assert report.notes(cases[2:]) == ["peer not run (qwen3-30b-a3b): none"]
    assert report.notes(cases[1:2]) == ["peer not run (qwen3-30b-a3b): large"]


def test_command_prints_tables_and_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "_in_a_process", lambda spec, name: [3 * 2**20] * 6)
    result = bench(tmp_path, *SMALL, "--weights", "nf4", "--nested", "--lora-rank", 4)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert "…" not in result.stdout
    for words in ("x stack", "x best", "MiB", "3.00", "all decoded", "base frozen", "adapters of rank 4", NO_ADAPTERS):
        assert words in " ".join(result.stdout.split())
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["quantisation"] == {"quant_type": "nf4", "nested": True, "blocksize": 64}
    assert found["bitsandbytes"]
    assert [(c["T"], c["direction"]) for c in found["cases"]] == [
        (tokens, direction) for direction in ("forward", "forward_backward", "lora") for tokens in (1, 4)
    ]
    for case in found["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        adapted = case["direction"] == "lora"
        assert case["stack"] == (None if adapted else STACK)
        assert case["form"] == {"weight_bytes": NESTED.weight_bytes, "frozen": True, "rank": 4 if adapted else 0}
        assert 0 < case["decoded_bytes"]["active"] < case["decoded_bytes"]["stack"]
        ours = rows["grouped_nf4"]
        assert ours["passed"]
        assert ours["peak_bytes"] == 3 * 2**20
        assert bool(ours["times_stack"]) is not adapted
        assert rows[STACK]["reason"] == (NO_ADAPTERS if adapted else "")


def test_memory_and_adapters_can_be_left_out(tmp_path: Path) -> None:
    result = bench(tmp_path, *SMALL, "--weights", "fp4", "--no-memory", "--lora-rank", 0)
    assert result.exit_code == 0, result.output
    assert "MiB" not in result.stdout
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert [case["direction"] for case in cases] == ["forward"] * 2 + ["forward_backward"] * 2
    assert all(row["peak_bytes"] is None for case in cases for row in case["contenders"])


def test_executors_for_dense_weights_stand_with_their_reason(tmp_path: Path) -> None:
    result = bench(
        tmp_path, *SMALL, "--executor", "native", "--weights", "nf4", "--no-memory", "--direction", "forward"
    )
    assert result.exit_code == 1, result.output
    assert "native not run (qwen3-30b-a3b): gate_up_proj is nf4" in result.stdout


def test_bad_arguments_exit_with_2_and_one_line(tmp_path: Path) -> None:
    cases = [
        (("--weights", "int4"), "--weights int4: must be one of dense, nf4, fp4, mxfp4"),
        (("--weights", "mxfp4", "--nested"), "--nested: must go with --weights nf4 or fp4"),
        (("--weights", "nf4", "--executor", "grouped_nf4[odd]"), "--executor grouped_nf4[odd]: must be one of"),
        (("--executor", "triton[bf16]"), "--executor triton[bf16]: must be one of"),
        (("--nested",), "--nested: must go with --weights nf4 or fp4"),
        (("--lora-rank", 8), "--lora-rank 8: must go with --weights nf4, fp4 or mxfp4"),
        (("--direction", "lora"), "--direction lora: must go with --weights nf4, fp4 or mxfp4"),
        (("--weights", "nf4", "--direction", "lora", "--lora-rank", 0), "--lora-rank 0: must be at least 1 with"),
        (("--weights", "nf4", "--direction", "odd"), "must be one of forward, forward_backward, lora"),
    ]
    demand_one_line(bench, tmp_path, cases)


def test_default_cases_are_twelve() -> None:
    settings = Settings(("grouped_nf4",), weights="nf4", directions=("forward", "forward_backward", "lora"))
    assert settings.cases() == 12
    assert {routing for routing, _ in settings.pairs()} == {"real"}
