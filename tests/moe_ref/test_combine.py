"""Combine: weighted sums in slot order (C1)."""

import numpy as np

from moe_ref.combine import combine


def test_weighted_sum() -> None:
    outputs = np.array([[1.0], [10.0], [100.0], [1000.0]])
    assert combine(outputs, np.array([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[21.0], [4300.0]]


def test_sum_runs_in_increasing_k() -> None:
    """(1e16 + 1) - 1e16 is 0 in this order, and 1 in any order that adds the large terms first."""
    outputs = np.array([[1e16], [1.0], [-1e16]])
    assert combine(outputs, np.ones((1, 3))).tolist() == [[0.0]]


def test_no_tokens() -> None:
    assert combine(np.zeros((0, 3)), np.zeros((0, 2))).shape == (0, 3)
