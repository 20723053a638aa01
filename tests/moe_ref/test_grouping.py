"""Grouping by hand, on a small case (G1, R7)."""

import numpy as np

from moe_ref.grouping import group, permute, unpermute

IDS = np.array([[2, 0], [2, -1], [0, 5], [2, 2]])  # E = 4: expert 1 and 3 are empty; -1 and 5 are no experts


def test_order_is_stable_and_empty_slots_come_last() -> None:
    grouping = group(IDS, 4)
    assert grouping.order.tolist() == [1, 4, 0, 2, 6, 7, 3, 5]
    assert grouping.group_sizes.tolist() == [2, 0, 4, 0]
    assert grouping.group_offsets.tolist() == [0, 2, 2, 6, 6]


def test_empty_slots_keep_the_order_of_slots() -> None:
    """G1: whatever their ids."""
    assert group(np.array([[9, 0], [-1, 4], [-7, 2]]), 4).order.tolist() == [1, 5, 0, 2, 3, 4]


def test_offsets_are_exclusive_and_start_with_zero() -> None:
    assert group(np.array([[-1], [-7], [0]]), 1).group_offsets.tolist() == [0, 1]


def test_inverse_undoes_order() -> None:
    grouping = group(IDS, 4)
    assert grouping.order[grouping.inverse].tolist() == list(range(8))


def test_permute_takes_each_slot_s_token() -> None:
    x = np.arange(4.0)[:, None]
    assert permute(x, group(IDS, 4).order, 2)[:, 0].tolist() == [0, 2, 0, 1, 3, 3, 1, 2]


def test_unpermute_brings_slots_back() -> None:
    grouping = group(IDS, 4)
    rows = np.arange(8.0)[:, None]
    assert unpermute(rows[grouping.order], grouping.inverse)[:, 0].tolist() == list(range(8))


def test_no_tokens() -> None:
    grouping = group(np.zeros((0, 2), dtype=np.int64), 3)
    assert grouping.group_offsets.tolist() == [0, 0, 0, 0]
