"""Times of several actions, taken in turn."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from executors._bench.cuda import event_seconds

MIN_ROUNDS = 7
MAX_ROUNDS = 100
REPEATED_S = 1.0  # quicker calls with backward are made twice on a CPU
LOW, HIGH = 0.1, 0.9  # the quantiles of a spread

Clock = Callable[[Callable[[], None]], float]  # seconds of a call


@dataclass(frozen=True)
class Spread:
    """A median with its 10th and 90th percentile."""

    median: float
    low: float
    high: float


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
    """Runs every action once, and returns its seconds."""
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
    """Times all actions once in each round, in random order: no action always follows the same other one.

    Args:
        actions: by name.
        after: called after each action, outside its time.
        device: where they run.
        seconds: rounds go on for so long; there are at least ``rounds`` and at most `MAX_ROUNDS`.
        seed: of the order.
        progress: called with the rounds done.
        rounds: at least so many.
        clock: returns the seconds of a call; None is `seconds_of`.
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


def warm_seconds(action: Callable[[], None], after: Callable[[], None]) -> float:
    """Seconds of a call with backward on a CPU. A quick call is made twice, and the second one counts.

    Others ran since its last call, and the system, or a virtual machine's host, may have taken back the memory
    of its gradients. The time to get it again is not the call's own: training calls the same layer again at once.
    """
    seconds = seconds_of(action, "cpu")
    if seconds > REPEATED_S:
        return seconds
    after()
    return seconds_of(action, "cpu")


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
