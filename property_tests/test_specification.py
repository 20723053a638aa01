"""The specification against itself: NumPy, torch, autograd, and central differences must agree."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import MoEWeights, moe, moe_vjp, routed_experts, routed_experts_vjp
from moe_ref.activations import activation
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems
from moe_ref.error_bars import named
from moe_ref.experts import down, expert, up
from moe_ref.layer import layer_vjp
from sound_problems import agree, sound, sound_problems

STEP = 1e-7  # so small that no pre-activation crosses the clamp, whose margin is 1e-5


def in_torch(arrays: Arrays) -> tuple[dict[str, torch.Tensor], MoEWeights]:
    names = ("x", "router_logits", "topk_weights")
    leaves = {name: getattr(arrays, name) for name in names} | arrays.weights.parameters()
    tensors = {n: torch.tensor(v, requires_grad=True) for n, v in leaves.items() if v is not None}
    weights = arrays.weights.map(torch.from_numpy)
    return tensors, weights.with_parameters({n: tensors[n] for n in weights.parameters()})


@given(problem=sound_problems)
def test_numpy_equals_torch(problem: Problem) -> None:
    arrays = build(problem)
    tensors, weights = in_torch(arrays)
    dy, ids = torch.from_numpy(arrays.dy), torch.from_numpy(arrays.topk_ids)
    with torch.no_grad():
        if arrays.router_logits is not None:
            y, gradients = moe_vjp(tensors["x"], tensors["router_logits"], weights, dy)
        else:
            y, gradients = routed_experts_vjp(tensors["x"], ids, tensors["topk_weights"], weights, dy)
    results = named(y, gradients)
    if problem.entry == "layer":
        del results["topk_weights"]  # broken rows aside, it is a step on the way to the logits
    agree(problem, results)


@given(problem=sound_problems)
def test_vjp_equals_autograd(problem: Problem) -> None:
    """D1, D2, D3."""
    arrays = build(problem)
    tensors, weights = in_torch(arrays)
    if arrays.router_logits is not None:
        y = moe(tensors["x"], tensors["router_logits"], weights)
    else:
        y = routed_experts(tensors["x"], torch.from_numpy(arrays.topk_ids), tensors["topk_weights"], weights)
    if y.requires_grad:  # with no tokens, nothing is touched
        y.backward(torch.from_numpy(arrays.dy))
    zero = {n: torch.zeros_like(t) for n, t in tensors.items()}  # autograd gives None where nothing was touched
    results = {n: (zero[n] if t.grad is None else t.grad).numpy() for n, t in tensors.items()}
    agree(problem, {"y": y.detach().numpy()} | results)


@given(problem=sound_problems, data=st.data())
def test_vjp_equals_central_differences(problem: Problem, data: st.DataObject) -> None:
    """D1: along a random direction in every input at once, with the choice of experts fixed."""
    arrays = build(problem)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="direction"))
    names = [n for n in ("router_logits", "topk_weights") if getattr(arrays, n) is not None]
    values = {n: getattr(arrays, n) for n in ("x", *names)} | arrays.weights.parameters()
    values = {n: np.where(np.isfinite(v), v, 0.0) if n == "topk_weights" else v for n, v in values.items()}
    direction = {n: rng.standard_normal(v.shape) for n, v in values.items()}

    def run(shift: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        moved = {n: v + shift * direction[n] for n, v in values.items()}
        weights = arrays.weights.with_parameters({n: moved[n] for n in arrays.weights.parameters()})
        y, gradients = layer_vjp(
            moved["x"],
            moved.get("router_logits"),
            arrays.topk_ids,
            moved.get("topk_weights"),
            weights,
            arrays.dy,
        )
        return y, named(y, gradients)

    _, gradients = run(0.0)
    difference = float(np.sum((run(STEP)[0] - run(-STEP)[0]) * arrays.dy)) / (2 * STEP)
    terms = [float(np.sum(gradients[n] * direction[n])) for n in values]
    sizes = sum(float(np.sum(np.abs(gradients[n] * direction[n]))) for n in values)
    size_of_y = float(np.sum(np.abs(gradients["y"] * arrays.dy)))
    sd = reference(problem).bars["y"].sd("float64", "float64")  # of gelu's tail, where 1 + erf(g) is nearly 0
    rounding = 6 * float(np.sum(sd * np.abs(arrays.dy))) / STEP
    assert abs(difference - sum(terms)) <= 1e-6 * (sizes + size_of_y) + rounding


def unscaled(problem: Problem) -> Problem:
    """The weight multiplies o, which is a sum of products: it is no such sum after a norm."""
    config = replace(problem.config, scale_input=False)
    return replace(problem, entry="layer", config=config, post_expert_norm=False)


@given(problem=problems().map(unscaled).map(sound))
def test_d_topk_weights_needs_no_output(problem: Problem) -> None:
    """D3: <dy, o> equals <W_d^T dy, h> + <dy, b_d>, W_d with its adapter."""
    arrays = build(problem)
    weights = arrays.weights
    _, gradients = moe_vjp(arrays.x, arrays.router_logits, weights, arrays.dy)
    for t in range(problem.tokens):
        for k, e in enumerate(arrays.topk_ids[t]):
            parameters = expert(weights, int(e))
            h = activation(up(arrays.x[t : t + 1], parameters), problem.config)[0]
            bias = down(np.zeros((1, problem.intermediate)), parameters)[0]
            columns = down(np.eye(problem.intermediate), parameters) - bias
            projected = columns @ arrays.dy[t]
            size = np.abs(columns) @ np.abs(arrays.dy[t]) @ np.abs(h) + np.abs(arrays.dy[t]) @ np.abs(bias) + 1
            expected = projected @ h + arrays.dy[t] @ bias
            assert abs(gradients.topk_weights[t, k] - expected) <= 1e-12 * size


@given(problem=problems().map(sound))
def test_d_topk_weights_of_scaled_input(problem: Problem) -> None:
    """D3, C3: with the weight on the input, its gradient is <d(w x), x>: that of a layer whose weights are all 1."""
    arrays = build(replace(problem, entry="experts", empty_slots=False))
    weights = replace(arrays.weights, config=replace(problem.config, scale_input=True, limit=None, clamp="before"))
    w, step = arrays.topk_weights, 1e-6
    _, gradients = routed_experts_vjp(arrays.x, arrays.topk_ids, w, weights, arrays.dy)
    for k in range(problem.top_k):
        shift = np.zeros_like(w)
        shift[:, k] = step
        high, low = (routed_experts(arrays.x, arrays.topk_ids, w + s, weights) for s in (shift, -shift))
        difference = np.sum((high - low) * arrays.dy, axis=1) / (2 * step)
        assert np.allclose(gradients.topk_weights[:, k], difference, rtol=1e-4, atol=1e-4)
