"""Whether one choice of tiles beats another: both right, both timed in turn, and the difference more than noise."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from triton.errors import TritonError

from executors._triton.configs import KernelConfig
from moe_ref.conformance.problems.poison import poisoned

Clock = Callable[[Callable[[], object]], float]  # seconds of a call

BOUNDS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-14}  # one unit in the last place or so
COMPARED = 2**24  # numbers at a time
LEAST_GAIN = 0.005
ERRORS_OF_A_MEDIAN = 3.0
OF_DEVIATION = 1.4826 * 1.2533  # the error of a median of n is so many median deviations / sqrt(n)
HOPELESS, SEEN = 1.1, 3  # so much slower in each of the first rounds is not timed further
LONGEST_S = 2.0  # of a duel, once so many rounds are seen
FLUSHES = 4
FLUSHED = 4  # times the size of the L2 cache
REFUSED = (TritonError, RuntimeError, ValueError, AssertionError)  # of a tile: by the compiler, descriptors, the driver


class Products(Protocol):
    """What a contest is about; see `executors._tune.workload.Workload`."""

    def run(self, product: str, config: KernelConfig) -> list[Tensor]:
        """A product's results with these tiles."""


class Duel(NamedTuple):
    """Seconds, round by round."""

    old: list[float]
    new: list[float]

    @property
    def ratio(self) -> float:
        """Of the new time to the old one: the median of all rounds."""
        return statistics.median(self._ratios())

    @property
    def error(self) -> float:
        """The standard error of that median."""
        ratios = self._ratios()
        return OF_DEVIATION * statistics.median(abs(r - self.ratio) for r in ratios) / math.sqrt(len(ratios))

    @property
    def won(self) -> bool:
        """Whether the new one is faster, by more than noise."""
        return self.ratio + ERRORS_OF_A_MEDIAN * self.error < 1 - LEAST_GAIN

    def _ratios(self) -> list[float]:
        return [new / old for old, new in zip(self.old, self.new, strict=True)]


@dataclass
class Tally:
    """How many tiles were tried, and how many of them did not compile or launch, or were wrong."""

    tried: int = 0
    failed: int = 0
    wrong: int = 0


@dataclass
class Contest:
    """Compares choices of tiles for one layer.

    Attributes:
        products: what runs.
        shipped: the tiles whose results are right.
        clock: tells the seconds of a call.
        rounds: of a duel.
        wait: for the device, so that what failed there is raised here.
        tally: of the tiles tried.
    """

    products: Products
    shipped: KernelConfig
    clock: Clock
    rounds: int
    wait: Callable[[], None] = lambda: None
    tally: Tally = field(default_factory=Tally)
    _expected: tuple[str, list[Tensor]] = ("", [])

    def admits(self, product: str, config: KernelConfig) -> bool:
        """Whether a product compiles, launches and is right with these tiles."""
        self.tally.tried += 1
        expected = self._right(product)
        try:
            with poisoned():
                found = self.products.run(product, config)
            self.wait()
        except REFUSED:
            self.wait()  # raises where the device is lost: then there is nothing to go on with
            self.tally.failed += 1
            return False
        if not all(agree(*pair) for pair in zip(found, expected, strict=True)):
            self.tally.wrong += 1
            return False
        return True

    def duel(self, product: str, old: KernelConfig, new: KernelConfig, rounds: int | None = None) -> Duel:
        """Times both in turn; the first changes from round to round."""
        duel = Duel([], [])
        actions = [
            (times, partial(self.products.run, product, own)) for times, own in zip(duel, (old, new), strict=True)
        ]
        for _, action in actions:
            action()
        started = time.monotonic()
        for number in range(rounds or self.rounds):
            for times, action in actions[:: 1 if number % 2 else -1]:
                times.append(self.clock(action))
            hopeless = number + 1 == SEEN and all(b > HOPELESS * a for a, b in zip(*duel, strict=True))
            if hopeless or (number + 1 >= SEEN and time.monotonic() - started > LONGEST_S):
                break
        return duel

    def beats(self, product: str, new: KernelConfig, old: KernelConfig) -> bool:
        """Whether ``new`` is right, and faster than ``old`` by more than noise."""
        return self.admits(product, new) and self.duel(product, old, new).won

    def _right(self, product: str) -> list[Tensor]:
        if self._expected[0] != product:
            self._expected = ("", [])  # the memory, before there is more
            self._expected = (product, self.products.run(product, self.shipped))
        return self._expected[1]


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether every row differs by no more than rounding: rms of the difference over that of the row, or of all.

    NaN agrees with nothing.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not found.numel():
        return True
    columns = found.shape[-1] if found.dim() > 1 else 1
    pairs = [tensor.reshape(-1, columns).split(max(1, COMPARED // columns)) for tensor in (found, expected)]  # type: ignore[no-untyped-call]
    of_all = sum(right.double().square().sum() for right in pairs[1]) / expected.numel()
    return all(_rows_agree(own, right, of_all, BOUNDS[found.dtype]) for own, right in zip(*pairs, strict=True))


def _rows_agree(found: Tensor, expected: Tensor, of_all: Tensor, bound: float) -> bool:
    right = expected.double()
    off = (found.double() - right).square().mean(dim=1)
    return bool((off <= bound**2 * right.square().mean(dim=1).clamp(min=of_all)).all())


class GpuClock:
    """Times calls between two events on a busy GPU, which has read other memory before: launches cost nothing.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        size = max(2**26, FLUSHED * torch.cuda.get_device_properties(device).L2_cache_size)
        self.filler = torch.ones(size // 4, dtype=torch.int32, device=device)

    def __call__(self, action: Callable[[], object]) -> float:
        """Seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(FLUSHES):
            self.filler.max()
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def host_clock(action: Callable[[], object]) -> float:
    """Seconds of a call that the host itself works off."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
