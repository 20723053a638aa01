"""Calls of compiled kernels: jobs are shared out among as many threads as torch has."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numba
import numpy as np
import torch

Group = tuple[int, int, int]  # an expert, its first row, and the row past its last
_ONE_CALL = Lock()  # at a time: not all of Numba's ways to share work among threads can be entered twice


def run(alone: Any, shared: Any, costs: np.ndarray, given: tuple[Any, ...]) -> None:
    """All jobs.

    Args:
        alone: the kernel for jobs from one number to another, one after the other.
        shared: the kernel for several such ranges, one for each thread.
        costs: [jobs] about what each job costs.
        given: further arguments.
    """
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if count == 1:  # no threads at all: those of OpenMP do not survive a fork
        alone(0, len(costs), *given)
        return
    with _ONE_CALL:
        before = numba.get_num_threads()
        numba.set_num_threads(count)
        try:
            shared(bounds(costs, count), given)
        finally:
            numba.set_num_threads(before)


def bounds(costs: np.ndarray, threads: int) -> np.ndarray:
    """[threads + 1] Where each thread's jobs begin, and their number: shares of about the same cost."""
    done = np.cumsum(costs)
    shares = np.searchsorted(done, done[-1] * np.arange(1, threads) / threads, side="left") + 1
    return np.array([0, *np.minimum(shares, len(costs)), len(costs)], dtype=np.int64)
