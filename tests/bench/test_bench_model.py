"""``bench --model``: a whole block of a transformers model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import executors
from executors._bench.block import BlockRow, NoBlock, experts_inputs, make_block, measure_block, ratio
from executors._cli.app import app
from moe_ref import MoEWeights

MIXTRAL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL = [f"--set={name}={value}" for name, value in MIXTRAL.items()]
GPT_OSS = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8, "num_hidden_layers": 1}
DEEPSEEK = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 16}


class Leaky:
    """``native``, but for what it does with the output."""

    name = "leaky"
    capabilities = executors.Capabilities()
    change = staticmethod(lambda y: y * 1.05)

    def experts(self, x: torch.Tensor, **given: Any) -> torch.Tensor:
        return self.change(executors.get("native").experts(x, **given))

    def check(self, _x: torch.Tensor, _weights: object) -> None: ...


@pytest.fixture
def leaky() -> Iterator[str]:
    executors.register("leaky", Leaky)
    yield "leaky"
    executors.unregister("leaky")


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("MixtralForCausalLM", MIXTRAL), ("GptOssForCausalLM", GPT_OSS), ("DeepseekV3ForCausalLM", DEEPSEEK)],
)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_every_way_is_judged_and_timed(model: str, sizes: dict[str, int], direction: str, leaky: str) -> None:
    block = make_block(model, sizes, "cpu", torch.bfloat16, 0)
    rows = measure_block(block, 6, direction, ["native", "grouped_nf4", leaky], 0.0, 0, lambda _: None)
    by_name = {row.name: row for row in rows}
    assert list(by_name) == ["hf:eager", "hf:grouped_mm", "hf:batched_mm", "native", "grouped_nf4", "leaky"]
    for name in ("hf:eager", "hf:grouped_mm", "hf:batched_mm", "native"):
        row = by_name[name]
        assert 0 < row.error < 0.03, name  # type: ignore[operator]
        assert (row.failed, row.reason, len(row.seconds)) == (False, "", 7)
        assert ratio(row, rows) is not None
    assert by_name["grouped_nf4"].reason.startswith("gate_up_proj is dense")
    assert by_name["leaky"].failed
    assert not by_name["leaky"].seconds


class Upstream(torch.autograd.Function):
    """The identity, whose gradient has its columns in another order."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy.flip(1)


def one_nan(y: torch.Tensor) -> torch.Tensor:
    return y.masked_fill(torch.arange(y.numel()).view(y.shape) == 7, torch.nan)


def last_tokens_zero(y: torch.Tensor) -> torch.Tensor:
    return y * (torch.arange(len(y)) < 12)[:, None]


@pytest.mark.parametrize(
    "change", [one_nan, lambda y: y.detach() + 0 * y, Upstream.apply, last_tokens_zero, lambda y: y * 1.02]
)
@pytest.mark.parametrize(("model", "sizes"), [("MixtralForCausalLM", MIXTRAL), ("GptOssForCausalLM", GPT_OSS)])
def test_what_is_wrong_fails(
    change: Any, model: str, sizes: dict[str, int], leaky: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leaky, "change", staticmethod(change))
    block = make_block(model, sizes, "cpu", torch.bfloat16, 0)
    *_, native, row = measure_block(block, 14, "forward", ["native", leaky], 0.0, 0, lambda _: None)
    assert (native.failed, row.failed) == (False, True)
    assert not row.seconds


@pytest.mark.parametrize("changes", [{"limit": None}, {"alpha": 1.0}, {"limit": 10.0}, {"up_offset": 0.0}])
def test_another_gate_fails(changes: dict[str, Any], leaky: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights reach the clamp."""

    def experts(_self: Leaky, x: torch.Tensor, *, weights: MoEWeights, **given: Any) -> torch.Tensor:
        other = replace(weights, config=replace(weights.config, **changes))
        return executors.get("native").experts(x, weights=other, **given)

    monkeypatch.setattr(Leaky, "experts", experts)
    block = make_block("GptOssForCausalLM", GPT_OSS, "cpu", torch.bfloat16, 0)
    *_, row = measure_block(block, 64, "forward", [leaky], 0.0, 0, lambda _: None)
    assert row.failed


def test_the_reference_is_the_fastest_of_theirs() -> None:
    def timed(name: str, ours: bool, seconds: float) -> BlockRow:
        return BlockRow(name, ours, seconds=[seconds] * 3)

    rows = [timed("hf:eager", False, 4.0), timed("hf:grouped_mm", False, 2.0), timed("native", True, 1.0)]
    found = ratio(rows[2], rows)
    assert found is not None
    assert found.median == 2.0


def test_the_block_is_left_as_it_was() -> None:
    block = make_block("MixtralForCausalLM", MIXTRAL, "cpu", torch.bfloat16, 0)
    x, ids, weights = experts_inputs(block, torch.randn(1, 20, 64).bfloat16())
    assert (x.shape, ids.shape, weights.shape) == ((20, 64), (20, 2), (20, 2))
    before = block.experts.config._experts_implementation
    with block.on("batched_mm"):
        assert block.experts.config._experts_implementation == "batched_mm"
    assert block.experts.config._experts_implementation == before


def test_a_call_that_memory_does_not_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging went well, and then memory is full."""
    block = make_block("MixtralForCausalLM", MIXTRAL, "cpu", torch.bfloat16, 0)
    plain, calls = ALL_EXPERTS_FUNCTIONS["batched_mm"], []

    def too_large(module: Any, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) > 1:
            raise RuntimeError("can't allocate memory\nin several lines")
        return plain(module, x, *given)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", too_large)
    rows = {row.name: row for row in measure_block(block, 20, "forward", ["native"], 0.0, 0, lambda _: None)}
    assert (rows["hf:batched_mm"].reason, rows["hf:batched_mm"].seconds) == ("can't allocate memory", [])
    assert len(rows["native"].seconds) == 7


def test_models_without_such_a_block_are_refused() -> None:
    with pytest.raises(NoBlock, match="must have experts that transformers dispatches"):
        make_block("LlamaForCausalLM", {}, "cpu", torch.bfloat16, 0)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_command_prints_and_writes(tmp_path: Path, leaky: str) -> None:
    few = ["--tokens", "4", "--seconds", "0", "--executor", "native", "--direction", "forward", "--out", str(tmp_path)]
    result = command("--model", "MixtralForCausalLM", *SMALL, *few)
    assert result.exit_code == 0, result.output
    assert "MixtralExperts E=8 H=64 I=32" in result.output
    assert max(len(line) for line in result.output.splitlines() if not line.startswith("wrote")) <= 80
    (case,) = json.loads((tmp_path / "bench-model.json").read_text())["cases"]
    assert (case["T"], case["direction"]) == (4, "forward")
    assert [row["name"] for row in case["rows"]] == ["hf:eager", "hf:grouped_mm", "hf:batched_mm", "native"]
    result = command("--model", "MixtralForCausalLM", *SMALL, *few, "--executor", leaky)
    assert result.exit_code == 1
    assert "WRONG" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "LlamaForCausalLM"], "--model LlamaForCausalLM: must have experts that transformers dispatches"),
        (["--model", "No"], "--model 'No': must be a folder, or a model class of transformers"),
        (["--model", "MixtralForCausalLM", "--set", "no=1"], "no=1: must be a field of its configuration"),
        (["--model", "MixtralForCausalLM", "--set", "a"], "--set a: must be NAME=NUMBER"),
        (["--model", "MixtralForCausalLM", "--weights", "nf4"], "--weights nf4: must be left out with --model"),
        (["--model", "MixtralForCausalLM", "--layer", "x"], "--layer x: must be left out with --model"),
        (["--model", "MixtralForCausalLM", "--scale", "2"], "--scale 2: must be left out with --model"),
        (["--model", "MixtralForCausalLM", "--lora-rank", "0"], "--lora-rank 0: must be left out with --model"),
        (["--model", "MixtralForCausalLM", "--nested"], "--nested: must be left out with --model"),
        (["--model", "MixtralForCausalLM", "--set", "num_local_experts=0"], "must be NAME=NUMBER of at least 1"),
        (
            ["--model", "MixtralForCausalLM", *SMALL, "--set", "num_local_experts=1"],
            "MixtralSparseMoeBlock, MixtralExperts E=1 H=64 I=32: must run on hidden states alone: RuntimeError: ",
        ),
        (["--set", "a=1"], "--set a=1: must go with --model"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = command(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.splitlines()) == 1
