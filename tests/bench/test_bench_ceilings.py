"""What a benchmark holds times against: measured soon on any machine, in the executors' layout."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from executors._bench import ceilings
from executors._bench.ceilings import LARGEST, Ceilings, fastest_product, measure_ceilings

GFLOPS = {
    "instructions for bf16": {"bf16": 1300.0, "fp32": 150.0},
    "none": {"bf16": 2.0, "fp32": 90.0},
    "a slow machine": {"bf16": 0.6, "fp32": 3.0},
    "a GPU": {"bf16": 800_000.0, "fp32": 50_000.0},
}


class Products(TorchDispatchMode):
    """Keeps dtype and strides of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.mm.default:
            left, right = args
            self.seen.append((left.dtype, left.stride(), right.stride()))
        return func(*args, **(kwargs or {}))


def test_all_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are A Bᵀ with rows that are contiguous, in bf16 and in fp32."""
    monkeypatch.setattr(ceilings, "LARGEST", ceilings.SMALLEST)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**20})
    with Products() as products:
        found = measure_ceilings("cpu")
    size = ceilings.SMALLEST
    assert set(products.seen) == {(dtype, (size, 1), (1, size)) for dtype in (torch.bfloat16, torch.float32)}
    assert min(found.tflops, found.copy_gbs, found.read_gbs) > 0
    assert math.isfinite(found.gbs)
    assert found.product in ("bf16", "fp32")


@pytest.mark.parametrize("machine", GFLOPS)
def test_sizes_grow_as_far_as_the_machine_is_fast(machine: str) -> None:
    """A call takes at most 0.2 s, but for the smallest; a machine's best is that of its faster dtype."""
    rate, taken = GFLOPS[machine], dict[tuple[str, int], float]()

    def seconds(dtype: str, size: int) -> float:
        taken[dtype, size] = 2 * size**3 / rate[dtype] / 1e9
        return taken[dtype, size]

    tflops, product = fastest_product(seconds)
    assert product == max(rate, key=lambda dtype: rate[dtype])
    assert tflops == pytest.approx(rate[product] / 1000)
    for dtype in rate:
        sizes = [size for name, size in taken if name == dtype]
        assert sizes == [256 * 2**power for power in range(len(sizes))]
        assert sum(taken[dtype, size] for size in sizes) < 0.25
        assert sizes[-1] == LARGEST or 8 * taken[dtype, sizes[-1]] > 0.2


def test_the_fastest_size_counts() -> None:
    """Of a product that falls out of the cache, what it reached before."""
    tflops, product = fastest_product(lambda _, size: 2 * size**3 / (4e12 if size == 1024 else 1e12))
    assert tflops == pytest.approx(4.0)
    assert product in ("bf16", "fp32")


def test_the_best_of_two_keeps_the_dtype_of_the_faster() -> None:
    slow, fast = Ceilings(1.0, 5.0, 3.0, "fp32"), Ceilings(2.0, 4.0, 3.5, "bf16")
    assert slow.best_of(fast) == fast.best_of(slow) == Ceilings(2.0, 5.0, 3.5, "bf16")
