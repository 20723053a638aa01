"""Single calls of an experts module on `executors.hf`: dtypes, slots of other machines, few tokens, swapped weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import executors.hf
import families
from executors.hf import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("mixtral", "gpt_oss", "nemotron_h")
each = pytest.mark.parametrize("name", NAMES)
EXPERTS, HIDDEN = 4, 32


def experts(name: str, executor: str = "") -> nn.Module:
    """A module of its own, on transformers' loop or on an executor."""
    family = families.named(name)
    (module, *_) = families.experts_of(families.build(family), family).values()
    module = copy.deepcopy(module)
    if executor:
        executors.hf.use(module, executor)
    return module


def on(module: nn.Module, implementation: str) -> nn.Module:
    other = copy.deepcopy(module)
    other.config._experts_implementation = implementation
    return other


def slots(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights."""
    made = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=made)
    weights, ids = scores.topk(2)
    return torch.randn(tokens, HIDDEN, generator=made), ids, weights


def gradients(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """y, and the gradients of x, weights and parameters."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, ids, weights)
    leaves = [x, weights, *module.parameters()]
    upstream = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        far = (one.double() - other.double()).norm()
        assert far <= tolerance * max(other.double().norm().item(), 1e-3)


@each
@pytest.mark.parametrize("tokens", [1, 7])
def test_few_tokens(name: str, tokens: int) -> None:
    module = experts(name, "native")
    equal(gradients(module, *slots(tokens)), gradients(on(module, "eager"), *slots(tokens)))


@each
def test_no_tokens(name: str) -> None:
    y, x, weights, *parameters = gradients(experts(name, "native"), *slots(0))
    assert (y.shape, x.shape, weights.shape) == ((0, HIDDEN), (0, HIDDEN), (0, 2))
    assert not any(gradient.any() for gradient in parameters)


@each
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_hidden_states_in_another_dtype(name: str, weights: torch.dtype) -> None:
    """As transformers' grouped_mm has it: products in the dtype of the weights, y in that of x."""
    module = experts(name, "native").bfloat16()
    x, ids, scores = slots(7)
    x, scores = x.bfloat16().float(), scores.to(weights)
    y = module(x, ids, scores)
    assert y.dtype == torch.float32
    assert torch.equal(y, module(x.bfloat16(), ids, scores).float())
    expected = on(module, "grouped_mm")(x, ids, scores)
    assert (y - expected).norm() < 0.02 * expected.norm()
    wide = module.float()
    assert wide(x.bfloat16(), ids, scores).dtype == torch.bfloat16
    assert torch.equal(wide(x.bfloat16(), ids, scores), wide(x, ids, scores).bfloat16())


@each
def test_gradients_in_another_dtype(name: str) -> None:
    """They come back in the dtypes of what they belong to."""
    module = experts(name, "native").bfloat16()
    x, ids, weights = slots(7)
    found = gradients(module, x, ids, weights)
    assert [t.dtype for t in found] == [torch.float32] * 3 + [torch.bfloat16] * (len(found) - 3)
    expected = gradients(on(module, "grouped_mm"), x, ids, weights)
    equal(found, expected, 0.03)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """As for grouped_mm: experts run in the dtype of their weights. Even the first call finds the gate."""
    module = experts(name).to(dtype)
    executors.hf.register("native")
    module.config._experts_implementation = "moe_native"
    x, ids, weights = slots(7)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, ids, weights)
    assert torch.equal(found, module(x, ids, weights))
    assert found.dtype == torch.float32


@each
@pytest.mark.parametrize("empty", [EXPERTS, -1, EXPERTS + 3])
def test_slots_of_other_machines_are_empty(name: str, empty: int) -> None:
    """Expert parallelism gives them the id num_experts: whatever their weight, they add nothing and get no gradient."""
    module = experts(name, "native")
    x, ids, weights = slots(7)
    gone = torch.zeros(ids.shape, dtype=torch.bool)
    gone[::2, 0] = gone[3] = True
    for given in (weights, weights.masked_fill(gone, 0)):
        found = gradients(module, x, ids.masked_fill(gone, empty), given)
        expected = gradients(module, x, ids, weights.masked_fill(gone, 0))
        expected[2] = expected[2].masked_fill(gone, 0)
        equal(found, expected, 1e-6)
    assert not found[0][3].any()


@each
def test_all_slots_of_other_machines(name: str) -> None:
    module = experts(name, "native")
    x, ids, weights = slots(5)
    found = gradients(module, x, torch.full_like(ids, EXPERTS), weights)
    assert not any(t.any() for t in found)


@each
def test_experts_of_this_machine_alone(name: str) -> None:
    """Expert parallelism leaves some of the parameters here, and counts ids from the first of them."""
    whole = experts(name, "native")
    x, ids, weights = slots(7)
    parts = []
    for first in (0, 2):
        part = copy.deepcopy(whole)
        part.num_experts, part._is_expert_parallel = 2, True
        for key, parameter in whole.named_parameters():
            setattr(part, key, nn.Parameter(parameter[first : first + 2].detach().clone()))
        here = (ids >= first) & (ids < first + 2)
        local = torch.where(here, ids - first, 2)
        parts.append(part(x, local, weights.masked_fill(~here, 0)))
        assert weights_of(part).num_experts == 2
    equal([sum(parts)], [whole(x, ids, weights)])


@each
def test_weights_that_hooks_bring(name: str) -> None:
    """As offloading does: parameters are elsewhere, and are brought for each call."""
    module = experts(name, "native")
    expected = gradients(module, *slots(7))[0]
    kept = {key: parameter.detach() for key, parameter in module.named_parameters()}

    def bring(own: nn.Module, _: object) -> None:
        for key, value in kept.items():
            setattr(own, key, nn.Parameter(value.clone(), requires_grad=False))

    def leave(own: nn.Module, _: object, output: Tensor) -> None:
        for key, value in kept.items():
            setattr(own, key, nn.Parameter(value.to("meta"), requires_grad=False))

    leave(module, None, expected)
    module.register_forward_pre_hook(bring)
    module.register_forward_hook(leave)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(module(*slots(7)), expected)
        kept = {key: 2 * value for key, value in kept.items()}  # now others are brought
        with torch.no_grad():
            assert not torch.equal(module(*slots(7)), expected)
        kept = {key: value / 2 for key, value in kept.items()}


@each
def test_weights_are_views(name: str) -> None:
    """Nothing is copied: what is written into the parameters is in the view."""
    module = experts(name)
    weights = weights_of(module)
    owners = {parameter.data_ptr() for parameter in module.parameters()}
    assert {value.data_ptr() for value in weights.parameters().values()} == owners
    assert (weights.num_experts, weights.hidden_size) == (EXPERTS, HIDDEN)
