"""Which choices of experts are right (R2) where keys are computed with rounding and may differ in their last bits.

A choice is judged in NumPy, row by row. Let d = 4 * 2**-23 * max(1, |score|, |bias|), the largest of the row's finite
ones. A chosen key may be below the K-th largest by at most d, an unchosen key above it by at most d, and a chosen key
above the one before it by at most 2 d. Infinite keys are exact: of equal ones, the lower id wins. The same holds for
groups, with 2 d for a sum of two scores: ids are right if they are right under some right choice of groups.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from moe_ref.routing import (
    choice_keys,
    choose_groups,
    group_keys,
    keys_are_rounded,
    keys_of_groups,
    unbiased_keys,
)
from moe_ref.types import MoEConfig

UNIT = 4 * 2.0**-23
MARGIN = 8  # in units of d: what a problem must keep for an executor that does not tell which experts it chose


def admissible(ids: np.ndarray, logits: np.ndarray, config: MoEConfig, selection_bias: np.ndarray | None) -> np.ndarray:
    """[T] Whether each row of ``ids`` [T, K], distinct and in range, is a right choice for float64 logits [T, E]."""
    keys = choice_keys(logits, config, selection_bias)
    slack = _slack(logits, config, selection_bias)
    rows = range(len(ids))
    return np.array([_row_is_admissible(ids[t], keys[t], config, slack[t]) for t in rows], dtype=bool)


def have_margins(logits: np.ndarray, config: MoEConfig, selection_bias: np.ndarray | None) -> np.ndarray:
    """[T] Whether only one choice is admissible and no rounding comes near another choice."""
    if not keys_are_rounded(config, selection_bias):
        return np.ones(len(logits), dtype=bool)
    assert config.top_k is not None
    keys = choice_keys(logits, config, selection_bias)
    margin = MARGIN * _slack(logits, config, selection_bias)
    clear = np.ones(len(logits), dtype=bool)
    if config.num_groups > 1:
        of_groups = group_keys(keys, config)
        clear &= _gap(of_groups, config.topk_groups) > _group_slack(margin, config)
        keys = keys_of_groups(keys, choose_groups(of_groups, config))
    return clear & (_gap(keys, config.top_k) > margin)


def _gap(keys: np.ndarray, count: int) -> np.ndarray:
    """[T] How far the count-th largest key is above the next; infinite where both are -inf, which is exact."""
    if count == keys.shape[-1]:
        return np.full(len(keys), np.inf)
    ordered = -np.sort(-keys, axis=-1)
    last, following = ordered[:, count - 1], ordered[:, count]
    return np.where(np.isinf(following), np.inf, last - np.where(np.isinf(following), 0.0, following))


def _slack(logits: np.ndarray, config: MoEConfig, selection_bias: np.ndarray | None) -> np.ndarray:
    if not keys_are_rounded(config, selection_bias):
        return np.zeros(len(logits))
    sizes = np.abs(unbiased_keys(np.where(np.isfinite(logits), logits, 0.0), config))
    if selection_bias is not None:
        sizes = np.maximum(sizes, np.abs(np.where(np.isfinite(selection_bias), selection_bias, 0.0)))
    return UNIT * np.maximum(1.0, sizes.max(axis=-1))


def _group_slack(slack: np.ndarray, config: MoEConfig) -> np.ndarray:
    return 2 * slack if config.group_score == "top2_sum" else slack


def _row_is_admissible(ids: np.ndarray, keys: np.ndarray, config: MoEConfig, slack: float) -> bool:
    if config.num_groups == 1:
        return _is_top(ids, keys, slack)
    of_groups = group_keys(keys[None], config)[0]
    allowed = float(_group_slack(np.array(slack), config))
    cut = -np.sort(-of_groups)[config.topk_groups - 1]
    sure = np.flatnonzero(of_groups > cut + allowed)
    unsure = np.flatnonzero((of_groups <= cut + allowed) & (of_groups >= cut - allowed))
    places = config.topk_groups - len(sure)
    for rest in combinations(unsure, places) if np.isfinite(cut) else [unsure[:places]]:  # infinite: the lower groups
        kept = np.zeros(config.num_groups, dtype=bool)
        kept[[*sure, *rest]] = True
        if _is_top(ids, keys_of_groups(keys[None], kept[None])[0], slack):
            return True
    return False


def _is_top(ids: np.ndarray, keys: np.ndarray, slack: float) -> bool:
    ordered, cut = keys[ids], -np.sort(-keys)[len(ids) - 1]
    if np.any(ordered[1:] > ordered[:-1] + 2 * slack):
        return False
    for infinite in (np.inf, -np.inf):
        tied, own = np.flatnonzero(keys == infinite), ids[ordered == infinite]
        if np.any(own != tied[: len(own)]):
            return False
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[ids] = True
    return bool(np.all(keys[chosen] >= cut - slack) and np.all(keys[~chosen] <= cut + slack))
