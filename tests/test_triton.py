"""The executor ``triton``: what it refuses, what it tells, and routing that drawn problems do not reach."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import executors
from executors.triton import _grouping, _operator, _routing
from executors.triton._device import INTERPRETED
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights
from moe_ref.conformance.call import call
from moe_ref.conformance.checks import same_bits
from moe_ref.conformance.problem import Problem
from moe_ref.routing import route
from triton_cases import ALIGNED, DEVICE, inputs_of, interpreted, python


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_without_gpu_and_interpreter() -> None:
    done = python("-c", "import executors; executors.get('triton')")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "executors._protocol.Unavailable: executor 'triton' needs a GPU; "
        "TRITON_INTERPRET=1 checks its numbers without one, slowly"
    )


def test_unavailable_without_triton() -> None:
    """The other executors, auto among them, do without it."""
    code = "import sys; sys.modules['triton'] = None\nimport executors\nprint(executors.available())\n"
    done = python("-c", code + "executors.get('triton')")
    assert "'auto', 'grouped_mm', 'grouped_nf4', 'native'" in done.stdout
    message = done.stderr.strip().splitlines()[-1]
    assert message.endswith("""executor 'triton' needs triton: pip install "moe-ref[triton]\"""")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            replace(ALIGNED, dtype="float64"),
            "x.dtype=float64: must be one of bfloat16, float16, float32 for triton",
        ),
        (replace(ALIGNED, quant_type="nf4"), "gate_up_proj is nf4: must be dense for triton; see grouped_nf4"),
        (replace(ALIGNED, gate_up_rank=2), "lora=ExpertLoRA: must be None for triton"),
    ],
    ids=["float64", "nf4", "lora"],
)
def test_what_is_unsupported_is_named(problem: Problem, message: str) -> None:
    with pytest.raises(executors.Unsupported) as refusal:
        call(executors.get("triton"), inputs_of(problem))
    assert str(refusal.value) == message


def test_adapters_without_factors_are_none() -> None:
    inputs = inputs_of(ALIGNED)
    y = call(executors.get("triton"), inputs)
    empty = replace(inputs, weights=replace(inputs.weights, lora=ExpertLoRA()))
    assert torch.equal(call(executors.get("triton"), empty), y)


def test_too_many_slots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_grouping, "MOST_SLOTS", 79)
    with pytest.raises(executors.Unsupported, match=r"T\*K=80 slots: must be at most 79 for triton"):
        call(executors.get("triton"), inputs_of(ALIGNED))


def test_option_must_be_a_truth_value() -> None:
    with pytest.raises(TypeError, match="batch_invariant='yes': must be True or False"):
        executors.get("triton", batch_invariant="yes")


@pytest.mark.parametrize("entry", ["layer", "experts"])
def test_differentiating_is_refused_aloud(entry: str) -> None:
    """Not a silent zero: neither y's inputs nor the logits get a gradient that misses a part."""
    inputs = inputs_of(replace(ALIGNED, entry=entry))
    y = call(executors.get("triton"), inputs)
    assert y.requires_grad
    with pytest.raises(executors.Unsupported, match="triton has no backward pass: must be called under"):
        (y.sum() + inputs.x.sum()).backward()


def test_weights_of_routing_cannot_be_differentiated_either() -> None:
    inputs = inputs_of(ALIGNED)
    routing = executors.get("triton").route(inputs.router_logits, inputs.weights)
    with pytest.raises(executors.Unsupported, match="no backward pass"):
        routing.topk_weights.sum().backward()


def test_note_says_that_it_is_interpreted() -> None:
    inputs = inputs_of(ALIGNED)
    note = executors.get("triton").note(inputs.x, inputs.weights)
    assert bool(note) == INTERPRETED == executors.get("triton").capabilities.interpreted


def test_operators_keep_torch_s_rules() -> None:
    """Schema, fake kernels, dispatch; and torch.compile makes one graph for all T."""
    inputs = inputs_of(
        replace(ALIGNED, frozen=frozenset({"x", "router_logits", *inputs_of(ALIGNED).weights.parameters()}))
    )
    weights, graphs = inputs.weights, []
    routing = executors.get("triton").route(inputs.router_logits, weights)
    experts = (inputs.x, routing.topk_ids, routing.topk_weights, *weights.parameters().values())
    torch.library.opcheck(_operator.operator, (*experts, False, "swiglu", 1.0, None, 0.0, "interleaved", False))
    torch.library.opcheck(
        _routing.operator, (inputs.router_logits, None, False, 2, "softmax", False, 0.0, 1.0, 1, 1, "max")
    )

    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        graphs.append(graph)
        return graph.forward

    executor = executors.get("triton")
    torch._dynamo.reset()
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (12, 7, 33):
        given = inputs_of(replace(ALIGNED, tokens=tokens, seed=tokens))
        with torch.no_grad():
            y = compiled(given.x, given.router_logits, given.weights)
            assert same_bits(y, executor(given.x, given.router_logits, given.weights))
    assert len(graphs) == 1


def test_tf32_only_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(_operator, "forward", lambda x, *given: seen.append(given[6]) or torch.zeros_like(x))
    inputs = {dtype: inputs_of(replace(ALIGNED, dtype=dtype)) for dtype in ("float32", "float16")}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for given in inputs.values():
                call(executors.get("triton"), given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [False, False, True, False]  # never for fp16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_ids_of_rows_full_of_nan_are_in_range_and_distinct(dtype: str) -> None:
    """A NaN may have any bits: all of them set reads as the smallest integer, which stands for no expert (R4)."""
    integer = {"float32": torch.int32, "bfloat16": torch.int16, "float64": torch.int64}[dtype]
    logits = torch.full((3, 5), -1, dtype=integer).view(getattr(torch, dtype))
    logits[1, ::2] = torch.nan
    logits[2, 1:] = -torch.inf
    weights = MoEWeights(torch.zeros(5, 4, 4), torch.zeros(5, 4, 2), config=MoEConfig(5))
    routing = executors.get("triton").route(logits.to(DEVICE), weights)
    assert [sorted(ids) for ids in routing.topk_ids.tolist()] == [[0, 1, 2, 3, 4]] * 3
    assert routing.topk_weights.isnan().all()


@pytest.mark.parametrize(("experts", "top_k"), [(512, 10), (300, 300), (96, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_many_experts(experts: int, top_k: int, dtype: str) -> None:
    """Ties in nearly every row of bf16 logits: ids are those of the specification, lower ids first (R2)."""
    config = MoEConfig(top_k, renormalize=True)
    logits = torch.from_numpy(np.random.default_rng(experts).normal(size=(9, experts))).to(getattr(torch, dtype))
    weights = MoEWeights(torch.zeros(experts, 4, 4), torch.zeros(experts, 4, 2), config=config)
    found = executors.get("triton").route(logits.to(DEVICE), weights)
    expected = route(logits.double().numpy(), config)
    assert found.topk_ids.tolist() == expected.topk_ids.tolist()
    assert found.topk_weights.dtype == torch.promote_types(logits.dtype, torch.float32)
    np.testing.assert_allclose(found.topk_weights.cpu(), expected.topk_weights, rtol=2e-6)


@interpreted
def test_compare_shows_it_as_interpreted(tmp_path: Path) -> None:
    """The bundled layer passes; times are not measured."""
    command = ["-m", "executors", "compare", "--executor", "triton", "--tokens", "64", "--out", str(tmp_path)]
    done = python(*command, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreted, not timed" in " ".join(done.stdout.replace("│", " ").split())
    (row,) = json.loads((tmp_path / "compare.json").read_text())["executors"]
    assert row["executor"] == "triton"
    assert row["seconds"] == {}


@interpreted
def test_bench_leaves_it_out_aloud(tmp_path: Path) -> None:
    command = ["-m", "executors", "bench", "--layer", "mixtral-8x7b", "--scale", "64", "--tokens", "1"]
    command += ["--direction", "forward", "--routing", "uniform", "--seconds", "0", "--executor", "triton"]
    done = python(*command, "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert "interpreted: its times mean nothing" in " ".join(done.stdout.replace("│", " ").split()), done.stderr
