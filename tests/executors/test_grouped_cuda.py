"""On a GPU: executors of torch's grouped_mm never wait for it, and are captured in a CUDA graph."""

from dataclasses import replace

import pytest
import torch

import executors
from dense_cases import EVERYTHING
from inputs_on_cuda import copy_over
from moe_ref.conformance.judgement.call import Inputs, call, to_torch
from moe_ref.conformance.problems.build import build

OPTIONS = {"grouped_mm": {}, "grouped_nf4": {"path": "torch"}}  # its kernels are in test_triton_cuda.py
FORMS = {"grouped_mm": {}, "grouped_nf4": {"quant_type": "nf4", "blocksize": 32, "nested": "per expert"}}

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("name", FORMS),
]


def inputs_without_host(name: str, seed: int = 0) -> Inputs:
    """A bf16 problem on a GPU on which torch's grouped_mm reads its offsets by itself."""
    problem = replace(
        EVERYTHING,
        tokens=256,
        hidden=64,
        intermediate=32,
        dtype="bfloat16",
        lora_dtype="bfloat16",
        seed=seed,
        **FORMS[name],
    )
    inputs = to_torch(problem, build(problem), "cuda")
    note = executors.get(name, **OPTIONS[name]).note(inputs.x, inputs.weights)
    if note:
        pytest.skip(note)
    return inputs


def step(name: str, inputs: Inputs) -> torch.Tensor:
    for leaf in inputs.tensors().values():
        leaf.grad = None
    y = call(executors.get(name, **OPTIONS[name]), inputs)
    y.backward(inputs.dy)
    return y


def test_never_waits_for_the_gpu(name: str) -> None:
    inputs = inputs_without_host(name)
    step(name, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(name, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_is_captured_and_replayed(name: str) -> None:
    """A CUDA graph of forward and backward, replayed on other inputs, gives the bits of an eager call."""
    captured, other = inputs_without_host(name), inputs_without_host(name, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(name, captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(name, captured)
    copy_over(captured, other)
    captured.weights.selection_bias.data.copy_(other.weights.selection_bias)
    graph.replay()
    assert torch.equal(y, step(name, other))
    for leaf_name, leaf in captured.tensors().items():
        assert torch.equal(leaf.grad, other.tensors()[leaf_name].grad), leaf_name
