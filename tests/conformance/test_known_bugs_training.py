"""Bugs of public systems, in adapters, gradients, replays and memory: as in test_known_bugs.py."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import executors
from dense_cases import needs_all
from executors import Executor, grouped_mm
from executors._base.arguments import arguments_of
from moe_ref import MoEConfig, MoEWeights, routed_experts_vjp
from moe_ref.conformance.judgement.call import call
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.conformance.wrapped import Wrapped, experts
from moe_ref.types import DENSE, LORA_FACTORS
from planted import (
    ADAPTED,
    BASE,
    NAMES,
    Bug,
    Catches,
    Check,
    bug,
    demand_caught,
    demand_error_bars,
    inputs_of,
    with_gradient,
    with_gradients,
)

catches = Catches()


@pytest.fixture(params=NAMES)
def executor(request: pytest.FixtureRequest) -> Executor:
    return executors.get(request.param)


def gradient_lost(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, name: str) -> Tensor:
    return experts(inner, x, ids, w, with_gradients(weights, torch.zeros_like, (name,)))


@catches("adapters_without_gradient", *(bug(partial(gradient_lost, name=name)) for name in LORA_FACTORS))
def test_d1_gradients_reach_every_adapter(executor: Executor) -> None:
    """With all else frozen, gradients reached none of 192 adapters (unsloth-zoo 606)."""
    problem = replace(ADAPTED, frozen=frozenset({"x", "topk_weights", *DENSE}))
    for lora_dtype in ("float32", "bfloat16"):
        trained = replace(problem, dtype="bfloat16", lora_dtype=lora_dtype)
        inputs = inputs_of(trained)
        y = call(executor, inputs)
        assert y.requires_grad
        y.backward(inputs.dy)
        used = inputs.topk_ids.unique()
        for name in LORA_FACTORS:
            gradient = inputs.weights.parameters()[name].grad
            assert gradient is not None, name
            assert gradient[used].flatten(1).any(dim=1).all(), name
        check_problem(executor, trained)


@catches("lora_b_read_expert_slowest", "adapter_of_neighbour", "adapter_scaled_twice", "adapters_not_applied")
def test_e1_lora_b_as_peft_stores_it(executor: Executor) -> None:
    """B, stored (out, r*E) with the expert fastest, was read with the expert slowest (unsloth-zoo 1269)."""
    arrays, inputs = build(ADAPTED), inputs_of(ADAPTED)
    lora = arrays.weights.lora
    views, merged = {}, {}
    for name, scaling in (("gate_up", lora.gate_up_scaling), ("down", lora.down_scaling)):
        a, b = (inputs.weights.parameters()[f"{name}_lora_{which}"].detach() for which in "ab")
        num_experts, out, rank = b.shape
        stored_a = a.reshape(num_experts * rank, -1)
        stored_b = b.permute(1, 2, 0).reshape(out, rank * num_experts).contiguous()
        a = stored_a.view(num_experts, rank, -1)
        b = stored_b.view(out, rank, num_experts)
        views |= {f"{name}_lora_a": a.requires_grad_(), f"{name}_lora_b": b.permute(2, 0, 1).requires_grad_()}
        delta = scaling * torch.einsum("ore,eri->eoi", b.double(), a.double())  # as PEFT merges
        merged[f"{name}_proj"] = getattr(arrays.weights, f"{name}_proj") + delta.detach().numpy()
    whole = replace(arrays.weights.with_parameters(merged), lora=None)
    y, _ = routed_experts_vjp(arrays.x, arrays.topk_ids, arrays.topk_weights, whole, arrays.dy)
    np.testing.assert_allclose(reference(ADAPTED).bars["y"].exact, y, rtol=1e-10, atol=1e-12)
    demand_error_bars(executor, ADAPTED, replace(inputs, weights=inputs.weights.with_parameters(views)))


def with_factors(weights: MoEWeights, change: Callable[[str, Tensor], Tensor]) -> MoEWeights:
    parameters = weights.parameters()
    return weights.with_parameters({n: change(n, parameters[n]) for n in LORA_FACTORS if n in parameters})


@bug
def adapters_in_training_only(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    acting = float(torch.is_grad_enabled())
    return experts(inner, x, ids, w, with_factors(weights, lambda name, factor: factor * acting))


@bug
def adapter_of_one_expert_only(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    first = (torch.arange(weights.num_experts) == 0)[:, None, None]
    return experts(inner, x, ids, w, with_factors(weights, lambda name, factor: factor * first))


@bug
def adapter_of_one_projection_only(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    kept = with_factors(weights, lambda name, factor: factor * name.startswith("gate_up"))
    return experts(inner, x, ids, w, kept)


@catches("adapters_not_applied", adapters_in_training_only, adapter_of_one_expert_only, adapter_of_one_projection_only)
def test_e1_adapters_act(executor: Executor) -> None:
    """Adapters were loaded and silently left out (vllm 52194, 41384)."""
    inputs = inputs_of(ADAPTED)
    with torch.no_grad():
        with_, without = (
            call(executor, replace(inputs, weights=replace(inputs.weights, lora=lora)))
            for lora in (inputs.weights.lora, None)
        )
    assert (with_ != without).any(dim=1).all()
    for lora_dtype in ("float32", "bfloat16"):
        check_problem(executor, replace(ADAPTED, dtype="bfloat16", lora_dtype=lora_dtype))
    check_problem(executor, ADAPTED)


@bug
def expanded_gradient_read_once(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    def change(gradient: Tensor) -> Tensor:
        if any(gradient.stride()):
            return gradient
        return torch.cat([gradient[:1], torch.zeros_like(gradient[1:])])

    return with_gradient(experts(inner, x, ids, w, weights), change)


@catches(expanded_gradient_read_once, "weight_gradient_lacks_one_row")
def test_e4_expanded_upstream_gradient(executor: Executor) -> None:
    """y.sum().backward() sends a gradient without strides, and breaks torch's own grouped_mm, used bare."""
    for problem in (BASE, replace(ADAPTED, dtype="bfloat16", hidden=7)):
        check_problem(executor, replace(problem, dy_layout="scalar"))
        summed, given = inputs_of(problem), inputs_of(problem)
        with poisoned():
            call(executor, summed).sum().backward()
            call(executor, given).backward(torch.ones_like(given.x))
        for name, leaf in given.tensors().items():
            assert torch.equal(leaf.grad, summed.tensors()[name].grad), name


def ties_at_random(inner: Executor) -> Executor:
    def change(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
        return inner(x, logits.double() + 1e-9 * torch.rand_like(logits, dtype=torch.float64), weights)

    return Wrapped("ties_at_random", inner, layer=change)


def routes_out_of_sight(inner: Executor) -> Executor:
    """Chooses by plain torch operators, which a checkpoint's policy does not cover."""
    return Wrapped("routes_out_of_sight", inner)


@catches(ties_at_random)
def test_d5_plain_replay_gives_the_same_bits(executor: Executor) -> None:
    """Among tied logits in bf16, a replay chose another expert than the forward pass (unsloth-zoo 1008)."""
    problem = replace(BASE, entry="layer", logits="ties", dtype="bfloat16", routing_dtype="bfloat16")
    once, again = inputs_of(problem), inputs_of(problem)
    call(executor, once).backward(once.dy)
    checkpoint(executor, again.x, again.router_logits, again.weights, use_reentrant=False).backward(again.dy)
    for name, leaf in once.tensors().items():
        assert torch.equal(leaf.grad, again.tensors()[name].grad), name


@catches(routes_out_of_sight)
def test_d5_replay_keeps_the_experts_of_forward(executor: Executor) -> None:
    """A router's product differed by one bf16 step when replayed, and gradients went elsewhere (unsloth-zoo 1008)."""
    problem = replace(BASE, entry="layer", experts=2, config=MoEConfig(1), dtype="bfloat16")
    inputs, drift = inputs_of(problem), torch.zeros(2, dtype=torch.bfloat16)

    def layer(x: Tensor) -> Tensor:
        logits = torch.ones(len(x), 2, dtype=torch.bfloat16) + drift
        return executor(x, logits, inputs.weights)

    context = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    y = checkpoint(layer, inputs.x, use_reentrant=False, context_fn=context)  # a tie: all tokens go to expert 0
    drift[1] = 2.0**-7
    y.backward(inputs.dy)
    for name, parameter in inputs.weights.parameters().items():
        assert parameter.grad[0].any(), name
        assert not parameter.grad[1].any(), name


class Integers(TorchDispatchMode):
    """Collects the shapes of integer results narrower than 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.dtype in (torch.int32, torch.int16):
            self.narrow.add(tuple(out.shape))
        return out


def narrow_integers_of_a_huge_layer() -> set[tuple[int, ...]]:
    """Forward and backward of grouped_mm on tensors without memory, in which S*H, E*J*H and S*J pass 2**31."""
    tokens, num_experts, top_k, hidden, inner = 2**20, 128, 8, 8192, 4096

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = MoEWeights(
        meta(num_experts, 2 * inner, hidden), meta(num_experts, hidden, inner), config=MoEConfig(top_k)
    )
    ids, slot_weights = meta(tokens, top_k, dtype=torch.int64), meta(tokens, top_k, dtype=torch.float32)
    given = arguments_of(meta(tokens, hidden), ids, slot_weights, weights)
    forward, backward = (kernel._init_fn.__wrapped__ for kernel in grouped_mm.OPERATOR[:2])
    with Integers() as seen:
        y, z, *kept = forward(*given, True, False)
        gradients = backward(y, z, *kept, needs_all(given), *given)
    assert (y.shape, z.shape) == ((tokens, hidden), (tokens * top_k, 2 * inner))
    assert min(gradients[0].numel(), z.numel(), weights.gate_up_proj.numel()) > 2**31
    assert gradients[2].shape == weights.gate_up_proj.shape
    return seen.narrow


def test_e5_places_are_64_bit_in_a_layer_beyond_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses were computed in 32 bits (Liger 1246, vllm 34279). Only torch's own offs may be: they count rows."""
    assert narrow_integers_of_a_huge_layer() == {(128,)}
    multiply = grouped_mm.GroupedProducts.rows

    def by_narrow_places(self: grouped_mm.GroupedProducts, a: Tensor, matrices: Tensor) -> Tensor:
        places = torch.arange(len(a), dtype=torch.int32, device=a.device)
        return multiply(self, a[places], matrices)

    monkeypatch.setattr(grouped_mm.GroupedProducts, "rows", by_narrow_places)
    assert narrow_integers_of_a_huge_layer() != {(128,)}


class Made(TorchDispatchMode):
    """Weak references to every tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **kwargs or {})
        given = {id(a) for a in args}
        results = out if isinstance(out, tuple | list) else [out]
        self.references += [weakref.ref(t) for t in results if isinstance(t, Tensor) and id(t) not in given]
        return out

    def alive(self) -> list[Tensor]:
        gc.collect()
        return [t for reference in self.references if (t := reference()) is not None]


def keeps(what: Callable[[Tensor, Tensor, MoEWeights], Tensor]) -> Bug:
    """A planted bug that keeps part of y, x and the weights for ever."""

    def planted(inner: Executor) -> Executor:
        kept: list[Tensor] = []

        def change(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
            y = inner(x, logits, weights)
            kept.append(what(y, x, weights))
            return y

        return Wrapped("keeps", inner, layer=change)

    return planted


@catches(keeps(lambda y, x, weights: weights.down_proj * 2), keeps(lambda y, x, weights: weights.down_proj))
@catches(keeps(lambda y, x, weights: x.sum()), keeps(lambda y, x, weights: y))
def test_d4_nothing_stays_alive_after_a_call(executor: Executor) -> None:
    """A cache kept every layer's decoded weights alive under checkpointing (bitsandbytes' parametrization)."""
    for checkpointed in (False, True):
        inputs = inputs_of(replace(BASE, entry="layer", frozen=frozenset({"down_proj"})))
        given = [weakref.ref(t) for t in inputs.tensors().values()]
        with Made() as made:
            if checkpointed:
                y = checkpoint(executor, inputs.x, inputs.router_logits, inputs.weights, use_reentrant=False)
                assert all(t.data_ptr() == y.data_ptr() for t in made.alive())  # all else is computed anew
            else:
                y = call(executor, inputs)
                with torch.no_grad():
                    call(executor, inputs)
            y.backward(inputs.dy)
        del y, inputs
        assert not made.alive()
        assert [reference() for reference in given] == [None] * len(given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("check", "planted"), catches.pairs())
def test_planted_bug_is_caught(check: Check, planted: Bug, name: str) -> None:
    demand_caught(check, planted, name)


def test_every_test_of_an_executor_has_a_planted_bug() -> None:
    catches.demand_that_all_have_bugs(globals())
