"""The norm of each expert's output by hand (E8)."""

import math
from dataclasses import replace

import numpy as np
import torch

from moe_ref import MoEConfig, MoEWeights, routed_experts, routed_experts_vjp
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.packed import of_experts
from moe_ref.conformance.problems.problem import Problem
from moe_ref.post_expert_norm import normalize, normalize_vjp


def normed(gamma: list[float], eps: float = 1e-6, experts: int = 1) -> MoEWeights:
    """Squared ReLU; expert e multiplies x by e + 1."""
    eye = np.eye(len(gamma))
    scales = np.arange(1.0, experts + 1)[:, None, None]
    config = MoEConfig(1, activation="relu2", post_expert_norm_eps=eps)
    return MoEWeights(np.tile(eye, (experts, 1, 1)), scales * eye, config=config, post_expert_norm=np.array(gamma))


def test_the_factor_comes_before_the_mean() -> None:
    weights = normed([2.0, -1.0], eps=0.5)
    size = math.sqrt((6.0**2 + 4.0**2) / 2 + 0.5)
    np.testing.assert_allclose(normalize(np.array([[3.0, 4.0]]), weights), [[6 / size, -4 / size]], rtol=1e-15)


def test_every_slot_is_normalised_before_it_is_weighted() -> None:
    """Both experts give the same direction: so do their norms, whatever their sizes."""
    weights = normed([1.0, 1.0], eps=1e-30, experts=2)
    y = routed_experts(np.array([[3.0**0.5, 2.0]]), np.array([[0, 1]]), np.array([[0.25, 3.0]]), weights)
    size = math.sqrt((3.0**2 + 4.0**2) / 2)
    np.testing.assert_allclose(y, [[3.25 * 3 / size, 3.25 * 4 / size]], rtol=1e-14)


def test_zeros_stay_zeros_and_pass_a_gradient_back() -> None:
    outputs, d_normed = np.zeros((1, 2)), np.array([[3.0, 1.0]])
    weights = normed([2.0, 1.0], eps=0.25)
    assert not normalize(outputs, weights).any()
    d_outputs, d_gamma = normalize_vjp(outputs, weights, d_normed)
    assert d_outputs.tolist() == [[12.0, 2.0]]  # gamma do' / sqrt(eps)
    assert d_gamma.tolist() == [0.0, 0.0]


def test_gradients_are_those_of_differences() -> None:
    rng = np.random.default_rng(0)
    outputs, d_normed, step = rng.standard_normal((4, 3)), rng.standard_normal((4, 3)), 1e-6
    for eps in (1e-8, 0.5):
        weights = normed([1.0, -2.0, 0.0], eps)
        d_outputs, d_gamma = normalize_vjp(outputs, weights, d_normed)
        for column, shift in enumerate(step * np.eye(3)):
            rise = normalize(outputs + shift, weights) - normalize(outputs - shift, weights)
            np.testing.assert_allclose(d_outputs[:, column], (rise * d_normed).sum(1) / (2 * step), rtol=1e-6)
            more, less = (replace(weights, post_expert_norm=weights.post_expert_norm + s) for s in (shift, -shift))
            rise = normalize(outputs, more) - normalize(outputs, less)
            np.testing.assert_allclose(d_gamma[column], (rise * d_normed).sum() / (2 * step), rtol=1e-6)


def test_empty_slots_add_nothing() -> None:
    weights, x, dy = normed([2.0, 1.0]), np.array([[3.0, 1.0]]), np.array([[1.0, -1.0]])
    for config in (weights.config, replace(weights.config, scale_input=True)):
        own = replace(weights, config=config)
        alone = routed_experts_vjp(x, np.array([[0]]), np.array([[0.5]]), own, dy)
        beside = routed_experts_vjp(x, np.array([[-1, 0]]), np.array([[math.nan, 0.5]]), own, dy)
        assert (alone[0] == beside[0]).all()
        assert (alone[1].post_expert_norm == beside[1].post_expert_norm).all()
        assert beside[1].topk_weights[0, 0] == 0
        assert alone[1].topk_weights[0, 0] == beside[1].topk_weights[0, 1]


def test_autograd_agrees() -> None:
    problem = Problem(9, 4, 5, 6, MoEConfig(2, post_expert_norm_eps=0.01), post_expert_norm=True, entry="experts")
    arrays = build(problem)
    weights = arrays.weights.map(lambda value: torch.from_numpy(value).requires_grad_())
    x, w, dy = (torch.from_numpy(value) for value in (arrays.x, arrays.topk_weights, arrays.dy))
    ids = torch.from_numpy(arrays.topk_ids)
    y = routed_experts(x.requires_grad_(), ids, w.requires_grad_(), weights)
    y.backward(dy)
    _, gradients = routed_experts_vjp(arrays.x, arrays.topk_ids, arrays.topk_weights, arrays.weights, arrays.dy)
    for name, leaf in {"x": x, "topk_weights": w, **weights.parameters()}.items():
        np.testing.assert_allclose(getattr(gradients, name), leaf.grad, rtol=1e-10, atol=1e-12)


def test_other_experts_have_the_same_factor() -> None:
    """It is one for all: experts in another order leave it alone."""
    weights = build(Problem(2, 3, 2, 4, MoEConfig(1), post_expert_norm=True, gate_up_bias=True)).weights
    moved = of_experts(weights, np.array([2, 0, -1]))
    assert (moved.post_expert_norm == weights.post_expert_norm).all()
    assert (moved.gate_up_proj_bias[:2] == weights.gate_up_proj_bias[[2, 0]]).all()
