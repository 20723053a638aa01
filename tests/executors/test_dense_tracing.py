"""What native and grouped_mm promise to tracers: no look at a value, right operators, one graph for every dynamic T."""

import shutil
from dataclasses import replace

import pytest
import torch

import executors
from dense_cases import (
    EVERYTHING,
    PROBLEM,
    WATCHED,
    HostReads,
    arguments,
    both,
    demand_one_graph,
    demand_registered_right,
    each,
    every,
    inputs_of,
    needs_all,
)
from executors import grouped_mm, native
from executors._base.arguments import TENSORS, Arguments
from executors._pipeline import layer as _layer
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.problems.problem import Problem


@both
@pytest.mark.parametrize("entry", ["layer", "experts"])
def test_host_reads(name: str, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """native reads the group offsets once per forward pass, grouped_mm never does; backward reads nothing."""
    reads: list[str] = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append("cpu") or to_host(self))
    inputs = inputs_of(replace(EVERYTHING, entry=entry))
    expected = ["cpu"] if name == "native" else []
    with HostReads() as forward:
        y = call(executors.get(name), inputs)
    assert reads == expected
    assert forward.reads == []
    with HostReads() as backward:
        y.backward(inputs.dy)
    assert reads == expected
    assert backward.reads == []
    assert min(forward.count, backward.count) > 50  # the insides were seen


@both
def test_host_reads_are_seen_inside_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    combine = _layer.combine
    monkeypatch.setattr(_layer, "combine", lambda o, *a: combine(o * o.isfinite().all().item(), *a))
    inputs = inputs_of(PROBLEM)
    with HostReads() as mode:
        call(executors.get(name), inputs)
        torch.ones(3).nonzero()
    assert len(mode.reads) > 1


def without_values(inputs: Inputs) -> Arguments:
    """The operator's arguments as tensors that have no values: whatever looks at one raises."""
    return each(arguments(inputs), lambda t: t.detach().to("meta"))


def kernel(operator):  # type: ignore[no-untyped-def]
    """What runs inside the operator; autocast, which it turns off, knows no such device."""
    return operator._init_fn.__wrapped__


@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING, replace(PROBLEM, tokens=0), replace(PROBLEM, hidden=7)])
def test_grouped_mm_never_looks_at_a_value(problem: Problem) -> None:
    """Forward, backward and tangent on tensors without values: what a host would have to wait for raises here."""
    inputs = inputs_of(replace(problem, entry="experts", dtype="bfloat16", lora_dtype="bfloat16"))
    given = without_values(inputs)
    y, *kept = kernel(grouped_mm.OPERATOR.forward)(*given, True, False)
    assert (y.shape, y.device.type) == (inputs.x.shape, "meta")
    gradients = kernel(grouped_mm.OPERATOR.backward)(y, *kept, needs_all(given), *given)
    owners = [given[0], *given[2:TENSORS]]
    for gradient, owner in zip(gradients, owners, strict=True):
        assert owner is None or gradient.shape == owner.shape
    assert kernel(grouped_mm.OPERATOR.tangent)(*owners, *given).shape == y.shape


def test_native_looks_at_its_offsets() -> None:
    """The trace above can fail."""
    given = without_values(inputs_of(replace(PROBLEM, entry="experts")))
    with pytest.raises(NotImplementedError, match="no data"):
        kernel(native.OPERATOR.forward)(*given, True, False)


@every
@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING, replace(PROBLEM, gate_up_bias=False, down_bias=False)])
@pytest.mark.parametrize("tokens", [0, 12])
def test_operators_are_registered_right(name: str, tokens: int, problem: Problem) -> None:
    """torch.library.opcheck: schema, autograd, fake kernels, dynamic shapes."""
    if name == "triton" and (problem is not EVERYTHING) == (tokens > 0):
        pytest.skip("interpreted: some of them")
    demand_registered_right(WATCHED[name], replace(problem, tokens=tokens))


def test_the_choice_is_registered_right() -> None:
    from executors._base.routing import choose

    logits, bias = torch.randn(5, 8), torch.randn(8)
    torch.library.opcheck(choose, (logits, bias, 2, "sigmoid", 4, 2, "top2_sum", "score"))
    torch.library.opcheck(choose, (logits, bias, 2, "sigmoid", 1, 1, "max", "logit"))
    torch.library.opcheck(choose, (logits, None, 2, "softmax", 1, 1, "max", "score"))


@every
@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING])
def test_compiles_whole_with_dynamic_tokens(name: str, problem: Problem) -> None:
    demand_one_graph(executors.get(name), problem)


@both
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside inductor
def test_compiled_backends_agree(name: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    executor, inputs = executors.get(name), inputs_of(EVERYTHING)
    torch._dynamo.reset()
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    y = compiled(inputs.x, inputs.router_logits, inputs.weights)
    torch.testing.assert_close(y, call(executor, inputs), rtol=1e-5, atol=1e-5)
    y.backward(inputs.dy)
    assert inputs.x.grad is not None
