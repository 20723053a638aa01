"""What native and grouped_mm promise beyond the numbers: memory, frozen inputs, options. The suite has the rest."""

from dataclasses import replace

import pytest
import torch

import executors
from dense_cases import EVERYTHING, OPERATORS, PROBLEM, WATCHED, Watched, arguments, both, every, inputs_of, needs_all
from executors._base import operator as _operator
from executors._pipeline import grouping
from executors._pipeline import layer as _layer
from executors._pipeline.loop import LoopProducts
from executors._pipeline.operator import PipelineOperator
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.conformance.problems.problem import Problem

MATRICES = ("gate_up_proj", "down_proj")


@both
@pytest.mark.parametrize("frozen", sorted(inputs_of(EVERYTHING).tensors()))
def test_frozen_input_costs_no_gradient(name: str, frozen: str) -> None:
    """Its gradient is never made; what others get does not change by a bit."""
    full, part = inputs_of(EVERYTHING), inputs_of(replace(EVERYTHING, frozen=frozenset({frozen})))
    call(executors.get(name), full).backward(full.dy)
    y = call(executors.get(name), part)
    with Shapes(part) as made:
        y.backward(part.dy)
    for leaf, value in part.tensors().items():
        assert (value.grad is None) == (leaf == frozen)
        assert value.grad is None or torch.equal(value.grad, full.tensors()[leaf].grad)
    if frozen in MATRICES:
        assert part.tensors()[frozen].shape not in made.shapes


@every
@pytest.mark.parametrize("scale_input", [False, True])
def test_a_single_gradient_is_the_same(name: str, scale_input: bool) -> None:
    """Whatever else is left out for it."""
    problem = replace(EVERYTHING, tokens=5, config=replace(EVERYTHING.config, scale_input=scale_input))
    full = inputs_of(problem)
    call(executors.get(name), full).backward(full.dy)
    leaves = set(full.tensors())
    for leaf in leaves:
        alone = inputs_of(replace(problem, frozen=frozenset(leaves - {leaf})))
        call(executors.get(name), alone).backward(alone.dy)
        assert torch.equal(alone.tensors()[leaf].grad, full.tensors()[leaf].grad), leaf


@every
def test_hooks_may_hand_back_other_strides(name: str) -> None:
    """What is offloaded between forward and backward comes back as the hook likes it."""

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return tensor.t().contiguous().t() if tensor.ndim == 2 and tensor.numel() else tensor

    plain, hooked = inputs_of(EVERYTHING), inputs_of(EVERYTHING)
    call(executors.get(name), plain).backward(plain.dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, turned):
        y = call(executors.get(name), hooked)
    y.backward(hooked.dy)
    for leaf, value in plain.tensors().items():
        torch.testing.assert_close(hooked.tensors()[leaf].grad, value.grad, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_where_nothing_needs_a_gradient() -> None:
    """The operator is told to keep z only where somebody will ask for it."""
    asked: list[bool] = []

    def forward(*given: object) -> tuple[torch.Tensor]:
        asked.append(bool(given[-2]))
        return (torch.empty_like(inputs.x),)

    everything = frozenset(inputs_of(PROBLEM).tensors()) | {"topk_weights"}
    for frozen, grad in ((frozenset(), True), (everything - {"x"}, True), (frozenset(), False), (everything, True)):
        inputs = inputs_of(replace(PROBLEM, entry="experts", frozen=frozen))
        with torch.set_grad_enabled(grad):
            given = inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.weights
            _operator.apply(_operator.Operator(forward, None, None), *given, keep_z=True)
    assert asked == [True, True, False, False]


class Shapes(Watched):
    """Collects the shapes of all results that are not views of what was given."""

    def __init__(self, given: Inputs) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given.tensors().values()}
        self.shapes: set[torch.Size] = set()

    def saw(self, name: str, out: object) -> None:
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.given:
            self.shapes.add(out.shape)


@every
def test_inference_keeps_nothing(name: str) -> None:
    inputs = inputs_of(replace(PROBLEM, entry="experts"))
    with torch.no_grad():
        assert not call(executors.get(name), inputs).requires_grad
    given = arguments(inputs)
    with torch.no_grad():
        z = WATCHED[name].forward(*given, False, False)[1]
    assert z.numel() == 0


@every
@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING, replace(PROBLEM, dtype="bfloat16", entry="experts")])
def test_recompute_keeps_no_z_and_gives_the_same_bits(name: str, problem: Problem) -> None:
    """D4."""
    kept: dict[bool, list[torch.Size]] = {}
    results = {}
    for recompute in (False, True):
        inputs, saved = inputs_of(problem), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape) or t, lambda t: t):
            y = call(executors.get(name, recompute=recompute), inputs)
        y.backward(inputs.dy)
        kept[recompute] = saved
        results[recompute] = {"y": y} | {n: t.grad for n, t in inputs.tensors().items()}
    z = torch.Size([problem.tokens * problem.top_k, problem.gate_up_rows])
    assert z in kept[False]
    assert z not in kept[True]
    for leaf, value in results[False].items():
        assert torch.equal(value, results[True][leaf]), leaf


@both
def test_memory_kept_for_backward(name: str) -> None:
    """What stays beside inputs and parameters is z and the order: nothing of S*H."""
    inputs, saved = inputs_of(replace(PROBLEM, entry="experts")), []
    given = {t.untyped_storage().data_ptr() for t in (*inputs.tensors().values(), inputs.topk_ids)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(executors.get(name), inputs)
    slots = PROBLEM.tokens * PROBLEM.top_k
    own = sorted(tuple(t.shape) for t in saved if t.numel() and t.untyped_storage().data_ptr() not in given)
    assert own == sorted([(slots, PROBLEM.gate_up_rows), (slots,), (PROBLEM.experts + 1,)])


@both
def test_options_are_checked(name: str) -> None:
    with pytest.raises(TypeError, match=r"^recompute=1: must be True or False$"):
        executors.get(name, recompute=1)
    with pytest.raises(TypeError, match=r"^option fast=True of executor '\w+': must be one of 'recompute'$"):
        executors.get(name, fast=True)


class Allocations(Watched):
    """The largest tensor that is made, views of a given one left out."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.largest = 0

    def saw(self, name: str, out: object) -> None:
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.given:
            self.largest = max(self.largest, out.numel())


@both
def test_transposed_weights_are_not_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stack is never made contiguous: a model that stores (E, H, 2I) passes a view."""
    inputs = inputs_of(replace(PROBLEM, tokens=4, weights_layout="transposed"))
    stack = inputs.weights.gate_up_proj
    assert not stack.is_contiguous()
    with torch.no_grad(), Allocations(stack) as honest:
        call(executors.get(name), inputs)
    assert 0 < honest.largest < stack.numel()
    product = _layer.linear
    monkeypatch.setattr(_layer, "linear", lambda *a: stack.contiguous() is not None and product(*a))
    with torch.no_grad(), Allocations(stack) as copying:
        call(executors.get(name), inputs)
    assert copying.largest >= stack.numel()


@every
def test_other_libraries_are_unsupported(name: str) -> None:
    arrays = build(PROBLEM)
    with pytest.raises(executors.Unsupported, match=r"^x is a numpy.ndarray: must be a torch.Tensor$"):
        executors.get(name)(arrays.x, arrays.router_logits, arrays.weights)


@every
def test_weights_may_hold_parameters(name: str) -> None:
    module = torch.nn.ParameterDict({"gate_up": torch.randn(3, 8, 4), "down": torch.randn(3, 4, 4)})
    weights = MoEWeights(module["gate_up"], module["down"], config=MoEConfig(1))
    executors.get(name)(torch.randn(5, 4), torch.randn(5, 3), weights).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@every
@pytest.mark.parametrize("entry", ["layer", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_changes_nothing(name: str, dtype: str, entry: str) -> None:
    """It would otherwise reach into the operator and round fp32 products to bf16, forward or backward."""
    plain, cast = (inputs_of(replace(EVERYTHING, dtype=dtype, entry=entry)) for _ in range(2))
    expected = call(executors.get(name), plain)
    expected.backward(plain.dy)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(executors.get(name), cast)
        actual.backward(cast.dy)
    assert torch.equal(expected, actual)
    for leaf, value in plain.tensors().items():
        assert torch.equal(value.grad, cast.tensors()[leaf].grad), leaf


def test_a_single_row_is_never_multiplied_with_one_of_no_group() -> None:
    """G1: the two-row product stops where the last group does."""
    products = LoopProducts(torch.tensor([0, 1]))
    with poisoned():
        out = products.rows(torch.ones(2, 4), torch.ones(1, 3, 4))
    assert out[0].tolist() == [4.0, 4.0, 4.0]
    assert out[1].isnan().all()  # as the memory was: nobody wrote it


def test_offsets_are_64_bit() -> None:
    """E5."""
    ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    assert [tensor.dtype for tensor in grouping.group(ids, 3)] == [torch.int64, torch.int64]


class PlainProducts(LoopProducts):
    """For a single expert, by an operator that autocast knows: it leaves torch.mm(out=) and grouped_mm alone."""

    def rows(self, a: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return a @ matrices[0].t()


def test_autocast_does_not_reach_into_an_operator() -> None:
    """Whatever its products are made of."""
    operator = _operator.define(PipelineOperator("plain_probe", PlainProducts, on_host=True))
    given = arguments(inputs_of(Problem(12, 1, 16, 8, MoEConfig(1), entry="experts")))
    with torch.no_grad():
        expected = operator.forward(*given, True, False)
        with torch.autocast("cpu", torch.bfloat16):
            assert (given.x @ given.gate_up_proj[0].t()).dtype == torch.bfloat16
            actual = operator.forward(*given, True, False)
    assert all(torch.equal(e, a) and e.dtype == a.dtype for e, a in zip(expected, actual, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@both
def test_gradients_are_stored_as_their_parameters(name: str, dtype: str) -> None:
    """A stack that is stored by columns gets such a gradient: autograd would copy another one into that order."""
    gradients = []
    for layout in ("contiguous", "transposed"):
        inputs = inputs_of(replace(PROBLEM, entry="experts", dtype=dtype, weights_layout=layout))
        given = arguments(inputs)
        _, *kept = OPERATORS[name].forward(*given, True, True)
        found = OPERATORS[name].backward(inputs.dy, *kept, needs_all(given), *given)[2:4]
        for gradient, parameter in zip(found, (given.gate_up_proj, given.down_proj), strict=True):
            assert gradient.stride() == parameter.stride()
            assert (gradient.stride(2) == 1) == (layout == "contiguous")
        gradients.append(found)
    for one, other in zip(*gradients, strict=True):
        near = 1e-4 if dtype == "float32" else 0.02  # few units of the last place of bf16; the suite judges the numbers
        torch.testing.assert_close(one.float(), other.float(), rtol=near, atol=near)
