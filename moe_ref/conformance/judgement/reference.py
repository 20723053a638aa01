"""The exact answer to a problem, with its error bars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from moe_ref.conformance.judgement.gates import Bars
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.error_bars import TensorBars, error_bars
from moe_ref.numerics import FORMATS
from moe_ref.routing import weigh


@dataclass(frozen=True, eq=False)
class Reference:
    """The exact answer.

    Attributes:
        arrays: the problem's numbers.
        bars: exact value and error bars of y and of every gradient, token dimension flat.
        broken_routing: [T] tokens with undefined routing weights (R4).
        broken: [T] those, and tokens with a NaN or an infinity in x.
        infinite: [T] tokens with an infinity in x; their own output may be anything.
    """

    arrays: Arrays
    bars: Mapping[str, Bars]
    broken_routing: np.ndarray
    broken: np.ndarray
    infinite: np.ndarray

    def within(self, problem: Problem) -> bool:
        """Whether y and all gradients, with their error bars, are within the ranges of their dtypes."""
        sizes = {name: float(np.abs(bars.exact).max(initial=0.0)) for name, bars in self.bars.items()}
        return all(1.05 * size <= FORMATS[problem.dtype_of(name)].max for name, size in sizes.items())


@lru_cache(maxsize=64)
def reference(problem: Problem, chosen: tuple[int, ...] | None = None) -> Reference:
    """Builds a problem's numbers and samples its error bars, once for all executors and checks.

    Args:
        problem: the description.
        chosen: T*K ids that an executor chose where more than one choice is right.
    """
    return reference_of(problem, build(problem, chosen))


def reference_of(problem: Problem, arrays: Arrays) -> Reference:
    """Samples the error bars of numbers that need not be those which the problem's seed draws."""
    # One BLAS thread: the products are small, and beside torch's own threads more would only get in the way.
    with threadpool_limits(1, "blas"), np.errstate(invalid="ignore"):
        bars = bars_of(arrays, dtype=problem.dtype, seed=problem.seed)
    return with_bars(problem, arrays, bars)


def with_bars(problem: Problem, arrays: Arrays, bars: Mapping[str, Bars]) -> Reference:
    """The reference of error bars that are known, with the tokens that are broken."""
    if arrays.router_logits is None:
        broken_routing = np.zeros(problem.tokens, dtype=bool)
    else:
        with np.errstate(invalid="ignore"):
            weights = weigh(arrays.router_logits, arrays.topk_ids, problem.config)
        broken_routing = np.isnan(weights).any(axis=1)
    broken = broken_routing | ~np.isfinite(arrays.x).all(axis=1)
    return Reference(arrays, bars, broken_routing, broken, np.isinf(arrays.x).any(axis=1))


def bars_of(arrays: Arrays, **options: Any) -> dict[str, TensorBars]:
    """Samples the error bars of a problem's numbers; options as of `moe_ref.error_bars`."""
    routing: Any = {"router_logits": arrays.router_logits, "topk_weights": arrays.topk_weights}
    return error_bars(arrays.x, arrays.topk_ids, arrays.weights, arrays.dy, **routing, **options)
