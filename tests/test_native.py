"""What native promises beyond the numbers: synchronisations, tracing, memory, frozen inputs. The suite has the rest."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import executors
from executors import _native_op
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.call import Inputs, call, to_torch
from moe_ref.conformance.problem import Problem, build

CONFIG = MoEConfig(2, scoring="sigmoid", renormalize=True, limit=1.0, up_offset=1.0, gate_up_layout="interleaved")
PROBLEM = Problem(12, 5, 16, 8, CONFIG, gate_up_bias=True, down_bias=True)

# Operators that wait for a GPU: they bring a value to the host, or have a shape that depends on one.
SYNCHRONISING = ("_local_scalar_dense", "aten::item", "nonzero", "masked_select", "bincount", "unique")


class Watched(TorchDispatchMode):
    """Sees every operator below autograd, those inside native's own two as well.

    A mode is off while an operator that it was told of runs, so a custom operator's insides would go unseen: here its
    kernel is run with the mode on.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kernels = {"moe_ref::native": _native_op.forward, "moe_ref::native_backward": _native_op.backward}
        if func.name() in kernels:
            with self:
                return kernels[func.name()]._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        self.saw(func.name(), out)
        return out

    def saw(self, name: str, out: object) -> None:
        """Called with each operator and its result."""


class HostReads(Watched):
    """Lists what would make the host wait for a GPU, beside .cpu()."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.count = 0

    def saw(self, name: str, out: object) -> None:
        self.count += 1
        if any(word in name for word in SYNCHRONISING):
            self.reads.append(name)


def inputs_of(problem: Problem) -> Inputs:
    return to_torch(problem, build(problem))


def native() -> executors.Executor:
    return executors.get("native")


@pytest.mark.parametrize("entry", ["layer", "experts"])
def test_one_host_read_forward_and_none_backward(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append("cpu") or to_host(self))
    inputs = inputs_of(replace(PROBLEM, entry=entry))
    with HostReads() as forward:
        y = call(native(), inputs)
    assert reads == ["cpu"]
    assert forward.reads == []
    with HostReads() as backward:
        y.backward(inputs.dy)
    assert reads == ["cpu"]
    assert backward.reads == []
    assert min(forward.count, backward.count) > 50  # the insides were seen


def test_host_reads_are_seen_inside_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    add = _native_op._add_bias
    monkeypatch.setattr(
        _native_op, "_add_bias", lambda product, bias: add(product, bias * bias.isfinite().all().item())
    )
    inputs = inputs_of(PROBLEM)
    with HostReads() as mode:
        call(native(), inputs)
        torch.ones(3).nonzero()
    assert len(mode.reads) > 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_operators_are_registered_right(tokens: int, bias: bool) -> None:
    """torch.library.opcheck: schema, autograd, fake kernels, dynamic shapes."""
    inputs = inputs_of(replace(PROBLEM, tokens=tokens, entry="experts", gate_up_bias=bias, down_bias=bias))
    w = inputs.weights
    tensors = (inputs.topk_ids, inputs.topk_weights, w.gate_up_proj, w.down_proj, w.gate_up_proj_bias, w.down_proj_bias)
    activation = (1.0, 1.0, 1.0, "interleaved")
    torch.library.opcheck(_native_op.forward, (inputs.x, *tensors, True, *activation))
    _, z, order, offsets = (t.detach() for t in _native_op.forward(inputs.x, *tensors, True, *activation))
    detached = [None if t is None else t.detach() for t in (inputs.dy, inputs.x, *tensors)]
    needs = [True, True, True, True, bias, bias]
    torch.library.opcheck(_native_op.backward, (*detached, z, order, offsets, needs, *activation))


def test_compiles_whole_with_dynamic_tokens() -> None:
    """fullgraph=True, forward and backward, without a recompilation when T changes."""
    executor = native()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (12, 7, 33):
        problem = replace(PROBLEM, tokens=tokens, seed=tokens)
        eager, traced = inputs_of(problem), inputs_of(problem)
        expected, actual = call(executor, eager), compiled(traced.x, traced.router_logits, traced.weights)
        expected.backward(eager.dy)
        actual.backward(traced.dy)
        assert torch.equal(expected, actual)
        for name, leaf in eager.tensors().items():
            assert torch.equal(leaf.grad, traced.tensors()[name].grad), name
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside inductor
def test_compiled_backends_agree(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    executor, inputs = native(), inputs_of(PROBLEM)
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    y = compiled(inputs.x, inputs.router_logits, inputs.weights)
    torch.testing.assert_close(y, call(executor, inputs), rtol=1e-5, atol=1e-5)
    y.backward(inputs.dy)
    assert inputs.x.grad is not None


@pytest.mark.parametrize("frozen", ["x", "router_logits", "gate_up_proj", "down_proj", "gate_up_proj_bias"])
def test_frozen_input_costs_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is never allocated; what others get does not change by a bit."""
    full, part = inputs_of(PROBLEM), inputs_of(replace(PROBLEM, frozen=frozenset({frozen})))
    call(native(), full).backward(full.dy)
    sizes: list[int] = []
    original = _native_op._gradient
    monkeypatch.setattr(
        _native_op,
        "_gradient",
        lambda p, need: sizes.append(p.numel() if p is not None and need else 0) or original(p, need),
    )
    call(native(), part).backward(part.dy)
    for name, leaf in part.tensors().items():
        assert (leaf.grad is None) == (name == frozen)
        assert leaf.grad is None or torch.equal(leaf.grad, full.tensors()[name].grad)
    position = ["x", "router_logits", "gate_up_proj", "down_proj", "gate_up_proj_bias"].index(frozen)
    assert sizes[position] == 0
    assert sizes.count(0) == 1


def test_inference_keeps_nothing() -> None:
    inputs = inputs_of(PROBLEM)
    with torch.no_grad():
        assert not call(native(), inputs).requires_grad
    w = inputs.weights
    tensors = (w.gate_up_proj, w.down_proj, w.gate_up_proj_bias, w.down_proj_bias)
    ids, weights = inputs.topk_ids, torch.ones(inputs.topk_ids.shape)
    with torch.no_grad():
        z = _native_op.forward(inputs.x, ids, weights, *tensors, False, 1.0, None, 0.0, "concatenated")[1]
    assert z.numel() == 0


class Allocations(Watched):
    """The largest tensor that is made, views of a given one left out."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.largest = 0

    def saw(self, name: str, out: object) -> None:
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.given:
            self.largest = max(self.largest, out.numel())


def test_transposed_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stack is never made contiguous: a model that stores (E, H, 2I) passes a view."""
    inputs = inputs_of(replace(PROBLEM, weights_layout="transposed"))
    stack = inputs.weights.gate_up_proj
    assert not stack.is_contiguous()
    with torch.no_grad(), Allocations(stack) as native_s:
        call(native(), inputs)
    assert 0 < native_s.largest < stack.numel()
    groups = _native_op._groups
    monkeypatch.setattr(_native_op, "_groups", lambda offsets: stack.contiguous() is not None and groups(offsets))
    with torch.no_grad(), Allocations(stack) as copying:
        call(native(), inputs)
    assert copying.largest >= stack.numel()


def test_other_libraries_are_unsupported() -> None:
    arrays = build(PROBLEM)
    with pytest.raises(executors.Unsupported, match=r"^x is a numpy.ndarray: must be a torch.Tensor$"):
        native()(arrays.x, arrays.router_logits, arrays.weights)


def test_weights_may_hold_parameters() -> None:
    module = torch.nn.ParameterDict({"gate_up": torch.randn(3, 8, 4), "down": torch.randn(3, 4, 4)})
    weights = MoEWeights(module["gate_up"], module["down"], config=MoEConfig(1))
    native()(torch.randn(5, 4), torch.randn(5, 3), weights).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_changes_nothing(dtype: str) -> None:
    """It would otherwise reach into the operator and round fp32 products to bf16, forward or backward."""
    plain, cast = (inputs_of(replace(PROBLEM, dtype=dtype, entry="experts")) for _ in range(2))
    expected = call(native(), plain)
    expected.backward(plain.dy)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(native(), cast)
        actual.backward(cast.dy)
    assert torch.equal(expected, actual)
    for name, leaf in plain.tensors().items():
        assert torch.equal(leaf.grad, cast.tensors()[name].grad), name
