"""Routing by hand; laws and gradients are in property_tests."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moe_ref import MoEConfig, route
from moe_ref.routing import route_vjp
from moe_ref.scores import sqrtsoftplus, sqrtsoftplus_slope

INF = math.inf


def routed(logits: list[list[float]], **config: object) -> tuple[list[list[int]], np.ndarray]:
    routing = route(np.array(logits), MoEConfig(**config))  # type: ignore[arg-type]
    return routing.topk_ids.tolist(), routing.topk_weights


def test_equal_logits_choose_the_lower_id() -> None:
    """R2: torch.topk gives 6, 5, 4 here."""
    ids, _ = routed([[0.0] * 8], top_k=3)
    assert ids == [[0, 1, 2]]


def test_slots_are_ordered_by_logit_then_id() -> None:
    """R2."""
    ids, _ = routed([[1.0, 3.0, 2.0, 3.0]], top_k=3)
    assert ids == [[1, 3, 2]]


def test_minus_zero_ties_with_zero() -> None:
    """R2: -0 and +0 are equal keys."""
    ids, _ = routed([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0]], top_k=2)
    assert ids == [[0, 1], [0, 1]]


def test_softmax_then_choose() -> None:
    ids, weights = routed([[math.log(1), math.log(2), math.log(5)]], top_k=2, scoring="softmax")
    assert ids == [[2, 1]]
    np.testing.assert_allclose(weights, [[5 / 8, 2 / 8]], rtol=1e-15)


def test_choose_then_softmax() -> None:
    _, weights = routed([[math.log(1), math.log(2), math.log(5)]], top_k=2, scoring="topk_softmax")
    np.testing.assert_allclose(weights, [[5 / 7, 2 / 7]], rtol=1e-15)


def test_sigmoid_renormalised_and_scaled() -> None:
    logits = [[math.log(1), math.log(3)]]  # sigmoids 1/2 and 3/4
    _, plain = routed(logits, top_k=2, scoring="sigmoid")
    _, scaled = routed(logits, top_k=2, scoring="sigmoid", renormalize=True, routed_scaling_factor=2.5)
    np.testing.assert_allclose(plain, [[3 / 4, 1 / 2]], rtol=1e-15)
    np.testing.assert_allclose(scaled, [[2.5 * 3 / 5, 2.5 * 2 / 5]], rtol=1e-15)


def test_epsilon_saves_a_zero_sum() -> None:
    """R5: all chosen scores are exactly 0."""
    _, weights = routed([[-INF, -INF]], top_k=2, scoring="sigmoid", renormalize=True)
    assert weights.tolist() == [[0.0, 0.0]]


def test_epsilon_is_added_to_the_sum() -> None:
    """R5."""
    _, weights = routed([[0.0, 0.0]], top_k=1, scoring="softmax", renormalize=True, renormalize_eps=0.5)
    assert weights.tolist() == [[0.5]]


def test_minus_infinity_weighs_exactly_nothing() -> None:
    """R4: such an expert is chosen because no other is left."""
    for scoring in ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"):
        ids, weights = routed([[-INF, 1.0, -INF]], top_k=2, scoring=scoring)
        assert ids == [[1, 0]]
        assert weights[0, 1] == 0.0


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("spoiled", [[math.nan, 0.0, 1.0], [0.0, 1.0, math.nan], [INF, 0.0, 1.0], [-INF] * 3])
def test_broken_rows_are_nan_and_alone(scoring: str, spoiled: list[float]) -> None:
    """R4: a NaN breaks its row even if it is not chosen; ids stay in range and distinct; other rows are unaffected."""
    clean = [0.5, 0.25, 0.125]
    ids, weights = routed([clean, spoiled, clean], top_k=2, scoring=scoring)
    undefined = {"sigmoid": (), "sqrtsoftplus": (INF,)}.get(scoring, (INF, -INF))
    defined = not any(math.isnan(v) or v in undefined for v in spoiled)
    assert np.isnan(weights[1]).all() != defined
    assert len(set(ids[1])) == 2
    assert set(ids[1]) <= {0, 1, 2}
    alone_ids, alone = routed([clean], top_k=2, scoring=scoring)
    assert ids[0] == ids[2] == alone_ids[0]
    assert (weights[0] == alone[0]).all()


def test_large_logits_do_not_overflow() -> None:
    _, weights = routed([[1e4, -1e4]], top_k=2, scoring="softmax")
    assert weights.tolist() == [[1.0, 0.0]]
    _, weights = routed([[1e4, -1e4]], top_k=2, scoring="sigmoid")
    assert weights.tolist() == [[1.0, 0.0]]


def test_no_tokens() -> None:
    routing = route(np.zeros((0, 4)), MoEConfig(2))
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, 2)


def test_a_group_of_plus_and_minus_infinity_is_no_warning() -> None:
    """Such a row is undefined (R4); its ids are in range and distinct, and nothing is computed from inf - inf."""
    config = MoEConfig(2, scoring="topk_softmax", num_groups=2, topk_groups=1, group_score="top2_sum")
    routing = route(np.array([[np.inf, -np.inf, 0.0, 1.0]]), config)
    assert routing.topk_ids.tolist() == [[3, 2]]


def test_sqrtsoftplus_has_all_digits_on_both_sides() -> None:
    """R2: where exp(v) underflows, where 1 + exp(v) is 1, at 0, and where exp(v) overflows."""
    found = sqrtsoftplus(np.array([-INF, -1400.0, -60.0, -36.0, 0.0, 60.0, 1000.0]))
    tail = math.exp(-36.0)
    small = [0.0, math.exp(-700), math.exp(-30), math.sqrt(tail - tail**2 / 2)]
    expected = [*small, *map(math.sqrt, (math.log(2), 60, 1000))]
    np.testing.assert_allclose(found, expected, rtol=4e-16)


def test_slope_of_sqrtsoftplus() -> None:
    """D1: 0 at -inf; half the score far below 0; 1 / (2 score) far above."""
    values = np.array([-INF, -1400.0, -60.0, 0.0, 60.0])
    scores = sqrtsoftplus(values)
    expected = [0.0, scores[1] / 2, scores[2] / 2, 1 / (4 * scores[3]), 1 / (2 * scores[4])]
    np.testing.assert_allclose(sqrtsoftplus_slope(values), expected, rtol=4e-16)


def test_a_bias_on_the_logit_chooses_otherwise() -> None:
    """R3: sigmoids are .5 and .999; a bias of 1 lifts a sigmoid above the other, but not a logit."""
    logits, bias = np.array([[0.0, 7.0]]), np.array([1.0, 0.0])
    for key, chosen, weight in (("score", 0, 0.5), ("logit", 1, 1 / (1 + math.exp(-7)))):
        routing = route(logits, MoEConfig(1, scoring="sigmoid", selection_key=key), bias)  # type: ignore[arg-type]
        assert routing.topk_ids.tolist() == [[chosen]]
        np.testing.assert_allclose(routing.topk_weights, [[weight]], rtol=1e-15)


@pytest.mark.parametrize(("eps", "gradient"), [(0.25, 0.0), (0.5, 0.0), (1.0, 0.25)])
def test_the_larger_of_sum_and_epsilon(eps: float, gradient: float) -> None:
    """R5: the score is .5; with the sum below epsilon the divisor is constant, at equality it is the sum."""
    config = MoEConfig(1, renormalize=True, renormalize_eps=eps, renormalize_form="max")
    logits, ids = np.zeros((1, 2)), np.zeros((1, 1), dtype=int)
    assert route(logits, config).topk_weights.tolist() == [[0.5 / max(0.5, eps)]]
    assert route_vjp(logits, ids, config, np.ones((1, 1))).tolist() == [[gradient, -gradient]]


@pytest.mark.parametrize("form", ["add", "max"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_zero_sum_without_epsilon_gives_zeros(scoring: str, form: str) -> None:
    """R5: weights and gradients, and not 0/0."""
    config = MoEConfig(2, scoring, True, 0.0, renormalize_form=form)  # type: ignore[arg-type]
    logits, mask = np.array([[-INF, -INF, 0.5]]), np.array([1.0, 0.5, -INF])
    routing = route(logits, replace(config, top_k=2), mask)
    assert routing.topk_ids.tolist() == [[0, 1]]
    assert routing.topk_weights.tolist() == [[0.0, 0.0]]
    assert route_vjp(logits, routing.topk_ids, config, np.array([[3.0, 5.0]])).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("bias", [math.nan, -INF])
def test_a_bias_of_nan_or_minus_infinity_masks(bias: float) -> None:
    """R4: also a logit of +inf, which only a sigmoid has, and without a warning."""
    for key in ("score", "logit"):
        config = MoEConfig(1, "sigmoid", selection_key=key)  # type: ignore[arg-type]
        assert route(np.array([[INF, -1.0]]), config, np.array([bias, 0.0])).topk_ids.tolist() == [[1]]
        assert route(np.array([[-INF, -1.0]]), config, np.array([INF, 0.0])).topk_ids.tolist() == [[1]]


def test_groups_without_a_bias_are_judged_by_scores() -> None:
    """R2: by logits the second group would be kept, with a sum of 8 against -15."""
    ids, _ = routed([[5.0, -20.0, 4.0, 4.0]], top_k=1, num_groups=2, group_score="top2_sum")
    assert ids == [[0]]


def test_experts_outside_the_kept_groups_keep_their_weights() -> None:
    """R2: where the kept groups have too few; they tie at -inf, and the lower id wins."""
    ids, weights = routed([[1.0, -INF, -INF, 2.0]], top_k=2, scoring="sigmoid", num_groups=2, topk_groups=1)
    assert ids == [[3, 0]]
    np.testing.assert_allclose(weights, [[1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))]], rtol=1e-15)


def test_scales_are_of_the_chosen_experts() -> None:
    """R9: after renormalisation; a scale that nobody chose may be anything."""
    config, scale = MoEConfig(2, renormalize=True, renormalize_eps=0.0), np.array([3.0, -1.0, math.nan])
    routing = route(np.log([[1.0, 3.0, 0.5]]), config, expert_scale=scale)
    assert routing.topk_ids.tolist() == [[1, 0]]
    np.testing.assert_allclose(routing.topk_weights, [[-0.75, 0.75]], rtol=1e-15)
