"""On a GPU: ``triton`` never waits for it, is captured in a CUDA graph, and fills every configuration."""

from dataclasses import replace

import pytest
import torch

import executors
from moe_ref import MoEConfig
from moe_ref.conformance.build import build
from moe_ref.conformance.call import Inputs, call, to_torch
from moe_ref.conformance.checks import check_problem, same_bits
from moe_ref.conformance.problem import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GPT_OSS = MoEConfig(4, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
LAYER = Problem(64, 9, 128, 96, GPT_OSS, "bfloat16", gate_up_bias=True, down_bias=True, weights_layout="transposed")
TOKENS = (1, 8, 64, 1000)  # few, some and many rows per expert; slots of one chunk and of several


def inputs_of(problem: Problem) -> Inputs:
    return to_torch(problem, build(problem), "cuda")


@torch.no_grad()
def forward(inputs: Inputs) -> torch.Tensor:
    return call(executors.get("triton"), inputs)


@pytest.mark.parametrize("tokens", TOKENS)
def test_never_waits_for_the_gpu(tokens: int) -> None:
    inputs = inputs_of(replace(LAYER, tokens=tokens))
    forward(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", TOKENS)
def test_is_captured_and_replayed(tokens: int) -> None:
    """A CUDA graph replayed on other inputs, with other groups, gives the bits of an eager call."""
    captured, other = (inputs_of(replace(LAYER, tokens=tokens, seed=seed)) for seed in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(captured)
    with torch.no_grad():
        for name, leaf in captured.tensors().items():
            leaf.copy_(other.tensors()[name])
    graph.replay()
    assert same_bits(y, forward(other))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_every_configuration(tokens: int, dtype: str, layout: str) -> None:
    """Sizes that are aligned, with tails in every dimension, and gates in halves too."""
    problem = replace(LAYER, tokens=tokens, dtype=dtype, weights_layout=layout, hidden=336, intermediate=208)
    check_problem(executors.get("triton"), problem, "cuda")
    check_problem(executors.get("triton"), replace(problem, config=MoEConfig(4, activation="geglu")), "cuda")


def test_batch_invariant_over_all_sizes() -> None:
    """A token's output among many and alone (C2)."""
    executor = executors.get("triton", batch_invariant=True)
    inputs = inputs_of(replace(LAYER, tokens=1000))
    with torch.no_grad():
        whole = executor(inputs.x, inputs.router_logits, inputs.weights)
        for count in (1, 7, 130):
            assert same_bits(executor(inputs.x[:count], inputs.router_logits[:count], inputs.weights), whole[:count])
