"""The whole layer: leading dimensions, empty slots, dtypes in and out."""

import math

import numpy as np
import pytest
import torch

from moe_ref import MoEConfig, MoEWeights, moe, route, routed_experts

RNG = np.random.default_rng(0)
WEIGHTS = MoEWeights(RNG.standard_normal((5, 6, 4)), RNG.standard_normal((5, 4, 3)), config=MoEConfig(2))
X, LOGITS = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((2, 3, 5))


def test_leading_dimensions_are_only_form() -> None:
    flat = moe(X.reshape(6, 4), LOGITS.reshape(6, 5), WEIGHTS)
    assert (moe(X, LOGITS, WEIGHTS).reshape(6, 4) == flat).all()
    np.testing.assert_allclose(moe(X[0, 0], LOGITS[0, 0], WEIGHTS), flat[0], rtol=1e-14)


def test_layer_is_route_and_routed_experts() -> None:
    routing = route(LOGITS.reshape(6, 5), WEIGHTS.config)
    parts = routed_experts(X.reshape(6, 4), routing.topk_ids, routing.topk_weights, WEIGHTS)
    assert (moe(X, LOGITS, WEIGHTS).reshape(6, 4) == parts).all()


def test_empty_slots_add_exactly_nothing() -> None:
    """R7: whatever weight empty slots have."""
    ids, slot_weights = np.array([[0, 1]]), np.array([[0.5, 0.25]])
    more = np.array([[0, -1, 1, 5]]), np.array([[0.5, math.nan, 0.25, math.inf]])
    x = X[0, :1]
    assert (routed_experts(x, *more, WEIGHTS) == routed_experts(x, ids, slot_weights, WEIGHTS)).all()


def test_duplicate_ids_add_up() -> None:
    """R7."""
    x = X[0, :1]
    twice = routed_experts(x, np.array([[3, 3]]), np.array([[0.5, 0.25]]), WEIGHTS)
    once = routed_experts(x, np.array([[3]]), np.array([[0.75]]), WEIGHTS)
    np.testing.assert_allclose(twice, once, rtol=1e-14)


def test_no_tokens() -> None:
    assert moe(X[:0], LOGITS[:0], WEIGHTS).shape == (0, 3, 4)


def test_bf16_weights_give_float64() -> None:
    bf16 = [torch.from_numpy(a).bfloat16() for a in (WEIGHTS.gate_up_proj, WEIGHTS.down_proj, X)]
    y = moe(bf16[2], torch.from_numpy(LOGITS), MoEWeights(*bf16[:2], config=WEIGHTS.config))
    wide = [a.double().numpy() for a in bf16]
    expected = moe(wide[2], LOGITS, MoEWeights(*wide[:2], config=WEIGHTS.config))
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_inputs_are_not_changed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(s) for s in ((3, 4), (3, 5), (5, 6, 4), (5, 4, 3))]
    for array in arrays:
        array.flags.writeable = False
    moe(arrays[0], arrays[1], MoEWeights(*arrays[2:], config=MoEConfig(2)))
