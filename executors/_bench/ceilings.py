"""What the machine reaches: a product in the executors' layout, a large copy and a large sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from executors._bench.measure import seconds_of

CALLS = 5
SMALLEST, LARGEST = 256, 8192  # sizes of the square product
LONGEST = 0.2  # seconds: a size whose call should take longer is not tried
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COPY_BYTES = {"cpu": 2**29, "cuda": 2**32}

ProductSeconds = Callable[[str, int], float]  # seconds of a product: of which dtype, of which size


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches.

    Attributes:
        tflops: A Bᵀ, the faster of bf16 and fp32.
        copy_gbs: large copy, bytes read and written.
        read_gbs: large sum, bytes read.
        product: which dtype was the faster one.
    """

    tflops: float
    copy_gbs: float
    read_gbs: float
    product: str = "bf16"

    @property
    def gbs(self) -> float:
        """The larger of the two bandwidths."""
        return max(self.copy_gbs, self.read_gbs)

    def attainable(self, flops: float, size: float) -> float:
        """TFLOP/s that a call of so many operations which moves so many bytes can reach: the lower of two roofs."""
        return min(self.tflops, flops / size * self.copy_gbs / 1000)

    def best_of(self, other: Ceilings) -> Ceilings:
        """The larger of each. Ceilings are measured before and after a run, as other work may disturb one of them."""
        faster = max(self, other, key=lambda found: found.tflops)
        copy, read = max(self.copy_gbs, other.copy_gbs), max(self.read_gbs, other.read_gbs)
        return Ceilings(faster.tflops, copy, read, faster.product)


def measure_ceilings(device: str) -> Ceilings:
    """The fastest product, a large copy and a large sum; the best of a few calls each."""
    tflops, product = fastest_product(lambda dtype, size: _product_seconds(dtype, size, device))
    kind = torch.device(device).type
    size = COPY_BYTES.get(kind, COPY_BYTES["cpu"])
    source = torch.empty(size // 4, device=device).uniform_()
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    read = _best(lambda: source.sum(), device)
    return Ceilings(tflops, 2 * size / copy / 1e9, size / read / 1e9, product)


def fastest_product(seconds: ProductSeconds) -> tuple[float, str]:
    """TFLOP/s and dtype of the fastest product.

    Sizes double as long as a call stays short. So a machine that multiplies 16-bit numbers one by one takes no longer
    than one that has instructions for them.
    """
    return max((_fastest_size(partial(seconds, name)), name) for name in DTYPES)


def _fastest_size(seconds: Callable[[int], float]) -> float:
    size, tflops, expected = SMALLEST, 0.0, 0.0
    while size <= LARGEST and expected <= LONGEST:
        taken = seconds(size)
        tflops = max(tflops, 2 * size**3 / taken / 1e12)
        size, expected = 2 * size, 8 * taken
    return tflops


def _product_seconds(dtype: str, size: int, device: str) -> float:
    """Seconds of A Bᵀ, both stored by rows, as activations and weights are."""
    left, right = (torch.empty(size, size, dtype=DTYPES[dtype], device=device).normal_() for _ in range(2))
    return _best(lambda: torch.mm(left, right.t()), device)


def _best(action: Callable[[], torch.Tensor], device: str) -> float:
    def run() -> None:
        action()

    run()
    return min(seconds_of(run, device) for _ in range(CALLS))
