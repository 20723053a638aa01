"""On a GPU, forward and backward: ``triton`` never waits, is captured in a graph, and fills every configuration."""

from dataclasses import replace

import pytest
import torch

import executors
from inputs_on_cuda import copy_over
from moe_ref import MoEConfig
from moe_ref.conformance.judgement.call import Inputs, call, to_torch
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GPT_OSS = MoEConfig(4, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
LAYER = Problem(64, 9, 128, 96, GPT_OSS, "bfloat16", gate_up_bias=True, down_bias=True, weights_layout="transposed")
ADAPTED = replace(LAYER, gate_up_rank=16, down_rank=8)  # factors in float32 beside bfloat16
NF4 = replace(ADAPTED, quant_type="nf4", nested="one", hidden=320, intermediate=224)
MXFP4 = replace(ADAPTED, quant_type="mxfp4", hidden=320, intermediate=224, weights_layout="contiguous")
PROBLEMS = {"dense": LAYER, "adapters": ADAPTED, "nf4": NF4, "mxfp4": MXFP4}
TOKENS = (1, 8, 64, 1000)  # few, some and many rows per expert; slots of one chunk and of several


def inputs_of(problem: Problem) -> Inputs:
    return to_torch(problem, build(problem), "cuda")


def step(inputs: Inputs) -> dict[str, torch.Tensor]:
    """y and all gradients."""
    for leaf in inputs.tensors().values():
        leaf.grad = None
    y = call(executors.get("triton"), inputs)
    y.backward(inputs.dy)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in inputs.tensors().items()}


def demand_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert same_bits(found[name], value), name


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_never_waits_for_the_gpu(tokens: int, problem: Problem) -> None:
    inputs = inputs_of(replace(problem, tokens=tokens))
    step(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_captured_and_replayed(tokens: int, problem: Problem) -> None:
    """A CUDA graph replayed on other inputs, with other groups, gives the bits of an eager call."""
    captured, other = (inputs_of(replace(problem, tokens=tokens, seed=seed)) for seed in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(captured)
    copy_over(captured, other)
    graph.replay()
    demand_same(found, step(other))


def test_streams_side_by_side() -> None:
    """Steps of two layers, each in a stream of its own, give the bits of one after the other."""
    problems = replace(LAYER, tokens=1000), replace(ADAPTED, tokens=700, seed=1)
    expected = [step(inputs_of(problem)) for problem in problems]
    inputs, streams = [inputs_of(problem) for problem in problems], [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for given, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(given))
        torch.cuda.synchronize()
        for own, wanted in zip(found, expected, strict=True):
            demand_same(own, wanted)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_every_configuration(tokens: int, dtype: str, layout: str) -> None:
    """Sizes that are aligned, with tails in every dimension, and gates in halves too."""
    problem = replace(LAYER, tokens=tokens, dtype=dtype, weights_layout=layout, hidden=336, intermediate=208)
    check_problem(executors.get("triton"), problem, "cuda")
    check_problem(executors.get("triton"), replace(problem, config=MoEConfig(4, activation="geglu")), "cuda")


@pytest.mark.parametrize("path", ["fused", "decoded"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "problem", [NF4, replace(NF4, nested="per expert", hidden=336), MXFP4], ids=["nf4", "odd", "mxfp4"]
)
def test_every_configuration_of_4_bits(problem: Problem, dtype: str, tokens: int, path: str) -> None:
    """Both orders in memory, with tails, and gates in halves too."""
    executor = executors.get("grouped_nf4", path=path)
    for layout, config in (("contiguous", GPT_OSS), ("transposed", MoEConfig(4))):
        check_problem(
            executor, replace(problem, tokens=tokens, dtype=dtype, weights_layout=layout, config=config), "cuda"
        )


def test_batch_invariant_over_all_sizes() -> None:
    """A token's output among many and alone (C2)."""
    executor = executors.get("triton", batch_invariant=True)
    inputs = inputs_of(replace(LAYER, tokens=1000))
    with torch.no_grad():
        whole = executor(inputs.x, inputs.router_logits, inputs.weights)
        for count in (1, 7, 130):
            assert same_bits(executor(inputs.x[:count], inputs.router_logits[:count], inputs.weights), whole[:count])
