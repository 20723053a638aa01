"""The specification on JAX: jit, vjp and vmap must agree with NumPy. The draws of test_specification.py, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings

import moe_ref.jax  # noqa: F401  # makes pytrees of the dataclasses
from moe_ref import MoEWeights, moe, moe_vjp, routed_experts, routed_experts_vjp
from moe_ref.conformance import profiles
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems
from moe_ref.error_bars import named
from moe_ref.types import MoEConfig
from sound_problems import agree, sound, sound_problems

EXAMPLES = profiles.current().max_examples
WITHOUT_SHRINKING = [phase for phase in Phase if phase is not Phase.shrink]
FEW = settings(max_examples=max(5, EXAMPLES // 20), phases=WITHOUT_SHRINKING, deadline=None)  # each is compiled anew
QUICK = {  # to compile: the numbers are the same
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def arguments(problem: Problem, arrays: Arrays) -> tuple[tuple, Callable, Callable]:
    """Of a call by the problem's entry: its arrays in JAX, ids among them; the function; its vjp."""
    weights = replace(arrays.weights, config=problem.config)
    if arrays.router_logits is not None:
        return jax.tree.map(jnp.asarray, (arrays.x, arrays.router_logits, weights)), moe, moe_vjp
    given = (arrays.x, arrays.topk_ids, arrays.topk_weights, weights)
    return jax.tree.map(jnp.asarray, given), routed_experts, routed_experts_vjp


def named_results(problem: Problem, y: jax.Array, gradients: object) -> dict[str, np.ndarray]:
    results = named(y, gradients)
    if problem.entry == "layer":
        del results["topk_weights"]  # a step on the way to the logits
    return results


@FEW
@given(problem=sound_problems)
def test_numpy_equals_jax_under_jit(problem: Problem) -> None:
    """Group sizes are not known there: every expert computes all rows."""
    arrays = build(problem)
    with jax.enable_x64(True):
        given, _, vjp = arguments(problem, arrays)
        agree(problem, named_results(problem, *jax.jit(vjp, compiler_options=QUICK)(*given, jnp.asarray(arrays.dy))))


EVERYTHING = Problem(
    *(5, 4, 6, 5),
    MoEConfig(2, scoring="sigmoid", renormalize=True, num_groups=2, topk_groups=2, group_score="top2_sum"),
    gate_up_bias=True,
    down_bias=True,
    selection_bias="small",
    expert_scale=True,
    post_expert_norm=True,
    gate_up_rank=2,
    down_rank=1,
)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_numpy_equals_jax(activation: str) -> None:
    """One operation after the other, with a block of rows for each expert, as in NumPy."""
    problem = sound(replace(EVERYTHING, config=replace(EVERYTHING.config, activation=activation)))
    arrays = build(problem)
    with jax.enable_x64(True):
        given, _, vjp = arguments(problem, arrays)
        agree(problem, named_results(problem, *vjp(*given, jnp.asarray(arrays.dy))))


def gradients_by_jax(run: Callable, given: tuple, dy: jax.Array) -> dict[str, np.ndarray]:
    """y and the gradients that ``jax.vjp`` gives, by name."""
    *tensors, weights = given
    differentiable = [tensor for tensor in tensors if jnp.issubdtype(tensor.dtype, jnp.floating)]
    names = ["x", "router_logits" if len(tensors) == 2 else "topk_weights"]

    def of_floats(floats: list[jax.Array], weights: MoEWeights) -> jax.Array:
        found = iter(floats)
        return run(*(next(found) if jnp.issubdtype(t.dtype, jnp.floating) else t for t in tensors), weights)

    def both(dy: jax.Array, *primals: Any) -> tuple:
        y, vjp = jax.vjp(of_floats, *primals)
        return y, *vjp(dy)

    y, d_floats, d_weights = jax.jit(both, compiler_options=QUICK)(dy, differentiable, weights)
    found = {"y": y} | dict(zip(names, d_floats, strict=True)) | d_weights.parameters()
    return {name: np.asarray(value) for name, value in found.items()}


@FEW
@given(problem=sound_problems)
def test_vjp_equals_jax_vjp(problem: Problem) -> None:
    """D1, D2, D3: the hand-written backward pass against JAX's own."""
    arrays = build(problem)
    with jax.enable_x64(True):
        given, run, _ = arguments(problem, arrays)
        agree(problem, gradients_by_jax(run, given, jnp.asarray(arrays.dy)))


def of_a_layer(problem: Problem) -> Problem:
    return sound(replace(problem, entry="layer"))


@settings(FEW, max_examples=max(4, EXAMPLES // 25))
@given(problem=problems().map(of_a_layer))
def test_vmap_over_layers(problem: Problem) -> None:
    """Layers of one configuration and one shape, stacked leaf by leaf: each has the results that it has alone."""
    others = build(sound(replace(problem, seed=problem.seed + 1)))
    arrays = build(problem)
    with jax.enable_x64(True):
        both = [(*arguments(problem, one)[0], jnp.asarray(one.dy)) for one in (others, arrays)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
        y, gradients = jax.jit(jax.vmap(moe_vjp), compiler_options=QUICK)(*stacked)
        agree(problem, named_results(problem, *jax.tree.map(lambda leaf: leaf[1], (y, gradients))))
