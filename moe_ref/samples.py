"""What the samples of error bars are made with: deviations kept from the exact run, sums over samples, threads.

Nothing here depends on how many threads there are: each chunk of samples is computed alone, and the chunks are added up
in order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moe_ref._typing import Array
from moe_ref.numerics import Exact, Perturbed

PROBES = 65_536  # elements whose samples are kept, to see how far they err together
LEAST_WITH_A_GAIN = 1e-150  # an answer below it has none: errors divided by it are no numbers any more
KEPT_BYTES = 2**30  # of deviations at the most

Result = TypeVar("Result")


class Recorded(Exact):
    """No rounding. Keeps the deviation of each sum in the order of the calls, which is the same in every sample.

    Attributes:
        deviations: (site, deviation), or None for the deviation where more than `KEPT_BYTES` would be kept.
    """

    def __init__(self) -> None:
        self.deviations: list[tuple[str, np.ndarray | None]] = []
        self._left = KEPT_BYTES

    def accumulate(self, site: str, value: Array, sd: Callable[[], Array]) -> Array:
        """Returns ``value``."""
        deviation = np.asarray(sd()) if np.asarray(value).nbytes <= self._left else None
        self._left -= 0 if deviation is None else deviation.nbytes
        self.deviations.append((site, deviation))
        return value


class Replayed:
    """`Perturbed` for one run, with the deviations of the exact run.

    A sample's own deviations would differ from those by its errors, a millionth, and they are half the work.
    """

    def __init__(self, errors: Perturbed, recorded: Recorded) -> None:
        self._errors, self._deviations = errors, iter(recorded.deviations)

    def store(self, site: str, value: Array) -> Array:
        """As `Perturbed.store`."""
        return self._errors.store(site, value)

    def accumulate(self, site: str, value: Array, sd: Callable[[], Array]) -> Array:
        """As `Perturbed.accumulate`."""
        recorded, deviation = next(self._deviations)
        assert site == recorded, f"{site}: must come as in the exact run, which has {recorded} here"
        return self._errors.accumulate(site, value, sd if deviation is None else lambda: deviation)


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over some samples of one tensor's errors.

    Attributes:
        squares: of each element; the shape of the tensor.
        gains: [samples], <error, y> / <y, y>.
        probes: [samples, P] float32, the errors of up to `PROBES` elements.
    """

    squares: np.ndarray
    gains: np.ndarray
    probes: np.ndarray


class Total:
    """`Sums` over all samples: ``squares`` added up, ``gains`` and ``probes`` one after the other."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.squares = np.zeros(shape)
        self.gains: list[np.ndarray] = []
        self.probes: list[np.ndarray] = []

    def add(self, sums: Sums) -> None:
        """Adds a chunk."""
        self.squares += sums.squares
        self.gains.append(sums.gains)
        self.probes.append(sums.probes)


class Measured:
    """The exact value of one tensor, from which samples differ.

    Attributes:
        probed: flat indices of the elements whose samples are kept.
    """

    def __init__(self, exact: np.ndarray, seed: int) -> None:
        self.probed = np.arange(exact.size)
        if exact.size > PROBES:
            self.probed = np.sort(np.random.default_rng(seed).choice(exact.size, PROBES, replace=False))
        finite = np.isfinite(exact)
        self._exact = np.where(finite, exact, np.nan)
        self._y = np.where(finite, exact, 0.0).ravel()
        self._largest = float(np.abs(self._y).max(initial=0.0)) or 1.0
        self._y /= self._largest  # so that no square of a tiny tensor underflows
        if self._largest < LEAST_WITH_A_GAIN:
            self._y[:] = 0.0
        self._norm = float(self._y @ self._y) or 1.0

    def sums(self, values: np.ndarray, scale: float, count: int) -> Sums:
        """Sums up samples.

        Args:
            values: [count, ...], or [1, ...] where no error reaches the tensor.
            scale: size of the errors.
            count: how many samples.
        """
        errors = values - self._exact
        flat = errors.reshape(len(errors), self._y.size)
        with np.errstate(invalid="ignore"):
            gains = flat @ self._y
        if not np.isfinite(gains).all():  # where the answer is not finite there is nothing to measure
            flat[~np.isfinite(flat)] = 0.0
            gains = flat @ self._y
        probes = (flat if self.probed.size == self._y.size else flat.take(self.probed, axis=1)) / scale
        errors *= errors
        squares = errors[0] * count if len(errors) < count else errors.sum(axis=0) if count > 1 else errors[0]
        squares /= scale**2
        gains = np.broadcast_to(gains / self._norm / self._largest / scale, (count,))
        return Sums(squares, gains, np.broadcast_to(probes.astype(np.float32), (count, probes.shape[1])))


def in_order(tasks: Sequence[Callable[[], Result]], threads: int) -> Iterator[Result]:
    """The results of the tasks, in their order, some of them computed at once.

    Args:
        tasks: functions that share nothing.
        threads: how many run at once; as many results wait at the most.
    """
    if threads == 1:
        yield from (task() for task in tasks)
        return
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque()
        for task in tasks:
            running.append(pool.submit(copy_context().run, task))  # with the caller's `np.errstate`
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
