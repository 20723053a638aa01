"""Times of several actions, taken in turn, and the machine's own ceilings."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from executors._cli.bench_cuda import event_seconds

MIN_ROUNDS = 7
MAX_ROUNDS = 100
CEILING_CALLS = 5
LOW, HIGH = 0.1, 0.9  # the quantiles that the spread is told by
PRODUCT = {"cpu": 2048, "cuda": 8192}  # size of the square product
COPY_BYTES = {"cpu": 2**29, "cuda": 2**32}

Clock = Callable[[Callable[[], None]], float]  # seconds of a call


@dataclass(frozen=True)
class Spread:
    """A median with its 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches.

    Attributes:
        tflops: bf16 product of two large square matrices.
        copy_gbs: large copy, bytes read and written.
        read_gbs: large sum, bytes read.
    """

    tflops: float
    copy_gbs: float
    read_gbs: float

    @property
    def gbs(self) -> float:
        """The larger of the two bandwidths."""
        return max(self.copy_gbs, self.read_gbs)

    def attainable(self, flops: float, size: float) -> float:
        """TFLOP/s that a call of so many operations which moves so many bytes can reach: the lower of two roofs."""
        return min(self.tflops, flops / size * self.copy_gbs / 1000)

    def best_of(self, other: Ceilings) -> Ceilings:
        """The larger of each: measured before and after a run, in case other work came in between."""
        return Ceilings(
            max(self.tflops, other.tflops), max(self.copy_gbs, other.copy_gbs), max(self.read_gbs, other.read_gbs)
        )


def spread(samples: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile, interpolated between samples."""
    ordered = sorted(samples)
    return Spread(statistics.median(ordered), _quantile(ordered, LOW), _quantile(ordered, HIGH))


def ratios(reference: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as fast ``other`` is, round by round."""
    return [a / b for a, b in zip(reference, other, strict=True)]


def is_no_result(ratio: Spread, control: Spread) -> bool:
    """Whether a ratio lies within the spread of a contender against itself, taken the same on both sides of 1."""
    return abs(math.log(ratio.median)) <= max(abs(math.log(control.low)), abs(math.log(control.high)))


def warm_up(actions: dict[str, Callable[[], None]], after: Callable[[], None], device: str) -> dict[str, float]:
    """Runs every action once more, after it was judged, and tells the seconds."""
    seconds = {}
    for name, action in actions.items():
        seconds[name] = seconds_of(action, device)
        after()
    return seconds


def time_rounds(
    actions: dict[str, Callable[[], None]],
    after: Callable[[], None],
    device: str,
    seconds: float,
    seed: int,
    progress: Callable[[int], None],
    rounds: int = MIN_ROUNDS,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Times all actions once in each round, in random order, so that none always follows the same other.

    Args:
        actions: by name.
        after: called after each action, outside its time.
        device: where they run.
        seconds: rounds go on for so long; there are at least ``rounds`` and at most `MAX_ROUNDS`.
        seed: of the order.
        progress: called with the rounds done.
        rounds: at least so many.
        clock: tells the seconds of a call; None takes `seconds_of`.
    """
    order, rng = list(actions), random.Random(seed)
    clock = clock or (lambda action: seconds_of(action, device))
    times: dict[str, list[float]] = {name: [] for name in actions}
    started = time.perf_counter()
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(MAX_ROUNDS):
            if number >= rounds and time.perf_counter() - started > seconds:
                break
            rng.shuffle(order)
            for name in order:
                times[name].append(clock(actions[name]))
                after()
            progress(number + 1)
    finally:
        if collecting:
            gc.enable()
    return times


def seconds_of(action: Callable[[], None], device: str) -> float:
    """Seconds of one call; on a GPU, between events on an idle stream."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return event_seconds(action, device)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_ceilings(device: str) -> Ceilings:
    """A large bf16 product, a large copy and a large sum; the best of a few calls each."""
    kind = torch.device(device).type
    n, size = PRODUCT.get(kind, PRODUCT["cpu"]), COPY_BYTES.get(kind, COPY_BYTES["cpu"])
    left, right = (torch.empty(n, n, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    source = torch.empty(size // 4, device=device).uniform_()
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(left, right), device)
    copy = _best(lambda: target.copy_(source), device)
    read = _best(lambda: source.sum(), device)
    return Ceilings(2 * n**3 / product / 1e12, 2 * size / copy / 1e9, size / read / 1e9)


def _best(action: Callable[[], torch.Tensor], device: str) -> float:
    def run() -> None:
        action()

    run()
    return min(seconds_of(run, device) for _ in range(CEILING_CALLS))


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
