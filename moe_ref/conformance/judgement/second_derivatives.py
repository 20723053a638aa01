"""Clause D1: a second derivative is right or refused, and never silently wrong.

Whoever penalises a gradient, or multiplies by a Hessian, differentiates the backward pass. An executor whose backward
pass is no function of torch's autograd gives zeros there without a word. So the gradients are differentiated, along
random directions, in all that they depend on, the upstream gradient too, and compared with those of the specification,
which torch differentiates in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from moe_ref.conformance.judgement.call import Inputs, call, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, applicable
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.declared import without_undeclared
from moe_ref.conformance.problems.packed import decoded, in_whole_blocks
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import WEIGHTS
from moe_ref.layer import layer
from moe_ref.numerics import FORMATS, round_to_nearest
from moe_ref.routing import weigh
from moe_ref.types import LEARNED, Activation, MoEConfig
from moe_ref.validation import DECODED_DTYPES, FLOAT_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from executors import Executor

LEAST = 2.0**-49  # relative: what the specification's own derivatives are trusted for
LIMIT = 16.0  # of an error's size, in those that rounded inputs cause
SAMPLES = 8
REFUSALS = (RuntimeError, NotImplementedError)


def check_second_derivatives(executor: Executor, device: str = "cpu") -> str:
    """Demands of second derivatives that they are right, or that asking for them raises an error (D1).

    Returns:
        The reason why the clause does not apply to the executor, or "".

    Raises:
        ConformanceError: a second derivative is wrong, or silently none.
    """
    if not executor.capabilities.backward:
        return f"{executor.name} declares no backward pass"
    for problem in problems_of(executor):
        check_one(executor, problem, device)
    return ""


def check_one(executor: Executor, problem: Problem, device: str = "cpu") -> None:
    """Demands it on one problem, within the executor's capabilities."""
    arrays = build(problem)
    along = directions(problem, arrays)
    actual = second_derivatives(executor, to_torch(problem, arrays, device), along)
    if actual is None:
        return
    for name, measure in measured(problem, arrays, along, actual).items():
        if not measure <= LIMIT:
            message = (
                f"the second derivative in {name} is wrong by {measure:.3g} times what rounded inputs change, limit "
                f"{LIMIT:.0f}: must be right, or raise an error"
            )
            raise ConformanceError(executor, problem, "D1", message, name)


def problems_of(executor: Executor) -> list[Problem]:
    """Small layers with all that the executor declares, by each entry, with each activation."""
    able = executor.capabilities
    kinds = [kind for kind in WEIGHTS if kind in able.weights][:1]
    allowed = FLOAT_DTYPES if kinds == ["dense"] else DECODED_DTYPES
    dtype = next(d for d in ("float32", *allowed) if d in able.dtypes and d in allowed)
    found = []
    for number, activation in enumerate(a for a in get_args(Activation) if a in able.activations):
        full = Problem(
            3,
            4,
            8,
            5,
            MoEConfig(2, renormalize=True, activation=activation),
            dtype,
            "layer" if number % 2 == 0 else "experts",
            gate_up_bias=True,
            down_bias=True,
            expert_scale=True,
            post_expert_norm=number == 1,
            gate_up_rank=2,
            down_rank=2,
            quant_type="" if kinds == ["dense"] else kinds[0],
            blocksize=32,
            seed=number,
        )
        full = applicable(executor, full)
        frozen = {"expert_scale"} if full.entry == "experts" else set[str]()  # ignored there
        found.append(without_undeclared(in_whole_blocks(replace(full, frozen=frozenset(frozen))), able))
    return found[:2] if able.interpreted else found


def directions(problem: Problem, arrays: Arrays) -> dict[str, np.ndarray]:
    """A random direction for each gradient, in the dtype of its owner."""
    rng = np.random.default_rng(problem.seed)
    owners = _owners(arrays)
    return {
        name: round_to_nearest(rng.standard_normal(value.shape), problem.dtype_of(name))
        for name, value in owners.items()
        if name != "dy" and name not in problem.frozen
    }


def _owners(arrays: Arrays) -> dict[str, np.ndarray]:
    """Everything that y and its gradients depend on, by name."""
    routing = {"router_logits": arrays.router_logits, "topk_weights": arrays.topk_weights}
    given = {"x": arrays.x, "dy": arrays.dy} | {name: value for name, value in routing.items() if value is not None}
    return given | arrays.weights.parameters()


def second_derivatives(
    executor: Executor, inputs: Inputs, directions: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """The derivatives of the sum of <direction, gradient> over all gradients, by name; None where they are refused.

    A derivative that is silently none is one of zeros.
    """
    leaves = {name: leaf for name, leaf in inputs.tensors().items() if leaf.requires_grad}
    dy = inputs.dy.detach().requires_grad_()
    y = call(executor, inputs)
    along = {
        n: torch.from_numpy(v).to(leaves[n]).reshape(leaves[n].shape) for n, v in directions.items() if n in leaves
    }
    try:
        first = torch.autograd.grad(y, [leaves[name] for name in along], dy, create_graph=True, allow_unused=True)
        pairs = zip(first, along.values(), strict=True)
        terms = [(g.double() * v.double()).sum() for g, v in pairs if g is not None and g.requires_grad]
        if terms:  # backward, not grad: grad would not run what torch's once_differentiable leaves to raise the error
            torch.autograd.backward(sum(terms[1:], terms[0]))
    except REFUSALS:
        return None
    return {
        name: np.zeros(tuple(leaf.shape)) if leaf.grad is None else leaf.grad.double().cpu().numpy()
        for name, leaf in (leaves | {"dy": dy}).items()
    }


def measured(
    problem: Problem, arrays: Arrays, directions: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The size of each tensor's error, in those of the changes that rounded inputs cause, by name."""
    arrays = replace(arrays, weights=decoded(arrays.weights))
    exact = _exact(problem, arrays, directions, None)
    rng, u = np.random.default_rng(problem.seed), max(FORMATS[problem.dtype].unit_roundoff, LEAST)
    samples = [_exact(problem, arrays, directions, (rng, u)) for _ in range(SAMPLES)]
    out = {}
    for name, value in exact.items():
        if name not in actual:
            continue
        spread = np.sqrt(np.mean([np.mean((sample[name] - value) ** 2) for sample in samples]))
        own = max(spread, u * np.sqrt(np.mean(value**2)), np.finfo(float).tiny)
        error = np.sqrt(np.mean((actual[name].reshape(value.shape) - value) ** 2))
        out[name] = float(error / own)
    return out


def _exact(
    problem: Problem,
    arrays: Arrays,
    directions: Mapping[str, np.ndarray],
    noise: tuple[np.random.Generator, float] | None,
) -> dict[str, np.ndarray]:
    """The specification's, by torch in fp64; with noise, of inputs that are rounded at random."""

    def leaf(value: np.ndarray) -> Tensor:
        if noise is not None:
            value = value * (1 + noise[1] * noise[0].standard_normal(value.shape))
        return torch.from_numpy(np.array(value)).requires_grad_()

    leaves = {name: leaf(value) for name, value in _owners(arrays).items() if name not in problem.frozen}
    own = {name: leaves[name] for name in LEARNED if name in leaves}
    held = arrays.weights.map(lambda value: torch.from_numpy(np.array(value)))
    weights = held.with_parameters(own)
    ids = torch.from_numpy(arrays.topk_ids)
    if problem.entry == "layer":
        slots = weigh(leaves["router_logits"], ids, weights.config, expert_scale=weights.expert_scale)
    else:
        slots = leaves["topk_weights"]
    y = layer(leaves["x"], ids, slots, weights)
    names = [name for name in directions if name in leaves and name not in arrays.weights.packed()]
    first = torch.autograd.grad(y, [leaves[name] for name in names], leaves["dy"], create_graph=True)
    along = [torch.from_numpy(directions[name]) for name in names]
    total = sum((g * v).sum() for g, v in zip(first, along, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    return {
        name: np.zeros(value.shape) if g is None else g.numpy()
        for (name, value), g in zip(leaves.items(), found, strict=True)
    }
