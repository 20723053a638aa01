"""Problems for native and grouped_mm, and eyes for what happens inside their operators."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from executors import Executor, grouped_mm, grouped_nf4, native
from executors._base.arguments import TENSORS, Arguments, arguments_of
from executors._base.operator import Operator
from moe_ref import MoEConfig
from moe_ref.conformance.judgement.call import Inputs, call, to_torch
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem

CONFIG = MoEConfig(2, scoring="sigmoid", renormalize=True, limit=1.0, up_offset=1.0, gate_up_layout="interleaved")
PROBLEM = Problem(12, 5, 16, 8, CONFIG, gate_up_bias=True, down_bias=True)
GROUPED = replace(CONFIG, num_groups=2, topk_groups=1, scale_input=True)
EVERYTHING = Problem(
    12, 6, 16, 8, GROUPED, gate_up_bias=True, down_bias=True, selection_bias="small", gate_up_rank=2, down_rank=3
)
OPERATORS = {"native": native.OPERATOR, "grouped_mm": grouped_mm.OPERATOR}
WATCHED = OPERATORS | {"grouped_nf4": grouped_nf4.OPERATOR}  # whose insides can be seen

# Operators that wait for a GPU: they bring a value to the host, or have a shape that depends on one.
SYNCHRONISING = ("_local_scalar_dense", "aten::item", "nonzero", "masked_select", "bincount", "unique")

both = pytest.mark.parametrize("name", OPERATORS)

if find_spec("triton") and not torch.cuda.is_available():  # on a GPU these tests, on a CPU, are not for it
    from executors._triton import operator as _triton

    WATCHED |= {"triton": _triton.OPERATOR}

every = pytest.mark.parametrize("name", [name for name in WATCHED if name != "grouped_nf4"])


class Watched(TorchDispatchMode):
    """Sees every operator below autograd, those inside the executors' own as well.

    A mode is off while an operator that it was told of runs, so a custom operator's insides would go unseen: here its
    kernel is run with the mode on.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kernels = {}
        for name, operator in WATCHED.items():
            kernels |= {f"moe_ref::{name}": operator.forward, f"moe_ref::{name}_backward": operator.backward}
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


def arguments(inputs: Inputs) -> Arguments:
    """The operator's arguments, but for what to keep."""
    return arguments_of(inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.weights)


def each(given: Arguments, change: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
    """An operator's arguments, all tensors changed, those in lists too."""
    return given.with_tensors([None if t is None else change(t) for t in given.tensors()])


def with_parameters(problem: Problem) -> Inputs:
    """A problem whose weights are parameters of a module, as they are in a model."""
    inputs = inputs_of(problem)
    own = {name: torch.nn.Parameter(value.detach()) for name, value in inputs.weights.parameters().items()}
    return replace(inputs, weights=inputs.weights.with_parameters(own))


def demand_registered_right(operator: Operator, problem: Problem, keep_decoded: bool = False) -> None:
    """torch.library.opcheck of both halves: schema, autograd, fake kernels, dynamic shapes."""
    inputs = inputs_of(replace(problem, entry="experts"))
    given = arguments(inputs)
    torch.library.opcheck(operator.forward, (*given, True, keep_decoded))
    _, *kept = (t.detach() for t in operator.forward(*given, True, keep_decoded))
    detached = each(given, torch.Tensor.detach)
    torch.library.opcheck(operator.backward, (inputs.dy, *kept, needs_all(given), *detached))


def demand_one_graph(executor: Executor, problem: Problem) -> None:
    """torch.compile(fullgraph=True), forward and backward, without a recompilation when T changes."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (12, 7, 33):
        eager, traced = (with_parameters(replace(problem, tokens=tokens, seed=tokens)) for _ in range(2))
        expected, actual = call(executor, eager), compiled(traced.x, traced.router_logits, traced.weights)
        expected.backward(eager.dy)
        actual.backward(traced.dy)
        assert torch.equal(expected, actual)
        for leaf, value in eager.tensors().items():
            assert torch.equal(value.grad, traced.tensors()[leaf].grad), leaf
    assert len(graphs) == 1


def needs_all(given: Arguments) -> list[bool]:
    """What to ask of backward: a gradient for everything that has one."""
    return [True, True, *(t is not None and t.is_floating_point() for t in given[3:TENSORS])]
