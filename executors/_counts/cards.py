"""What the units of some cards do in a second.

Figures of NVIDIA are from its data sheets and whitepapers. Those of A100 and H100 were compared with tables that quote
them (glennklockwood.com/garden/processors); those of H200 and RTX 4090 are from memory.
NVIDIA publishes no bandwidth of the L2 caches of Hopper and Ada. So for all cards it is what one public measurement of
``cp.async`` found (github.com/smallscientist1/cuda_microbenchmark, analysis_A100.md, analysis_H100.md and
analysis_RTX4090.md; the A100 there is the PCIe one). H200 is taken to have the cache of H100.
"""

from __future__ import annotations

from typing import NamedTuple

SCHEDULERS = 4  # of a multiprocessor; each issues an instruction of a warp in a clock (CUDA C++ Programming Guide)
WAVEFRONT = 128  # bytes: shared memory of a multiprocessor passes so many in a clock (same)


class Card(NamedTuple):
    """A card's rates.

    Attributes:
        name: as it is asked for.
        title: as it is sold.
        multiprocessors: how many.
        clock: in Hz, the highest that the data sheet's products imply or name.
        tensor: operations of tensor cores in a second, dense, into fp32, by dtype of the operands.
        l2, dram: bytes in a second.
        source: of the figures other than l2.
    """

    name: str
    title: str
    multiprocessors: int
    clock: float
    tensor: dict[str, float]
    l2: float
    dram: float
    source: str

    @property
    def issue(self) -> float:
        """Instructions of warps in a second."""
        return self.multiprocessors * SCHEDULERS * self.clock

    @property
    def wavefronts(self) -> float:
        """Passes of shared memory in a second."""
        return self.multiprocessors * self.clock


def _tensor(half: float, tf32: float) -> dict[str, float]:
    return {"bf16": half, "f16": half, "tf32": tf32}


HOPPER = "H100 whitepaper (132 multiprocessors, 989.4 TFLOP/s dense at 1830 MHz)"
CARDS = {
    card.name: card
    for card in (
        Card(
            "a100",
            "A100 SXM 80 GB",
            108,
            1.41e9,
            _tensor(312e12, 156e12),
            5.41e12,
            2.039e12,
            "A100 whitepaper and data sheet (108 multiprocessors, 1410 MHz, 312 TFLOP/s, 2039 GB/s)",
        ),
        Card(
            "h100",
            "H100 SXM",
            132,
            1.83e9,
            _tensor(989.4e12, 494.7e12),
            8.43e12,
            3.35e12,
            f"{HOPPER}; data sheet (3.35 TB/s)",
        ),
        Card(
            "h200",
            "H200 SXM",
            132,
            1.83e9,
            _tensor(989.4e12, 494.7e12),
            8.43e12,
            4.8e12,
            f"{HOPPER}; H200 data sheet (4.8 TB/s)",
        ),
        Card(
            "rtx4090",
            "GeForce RTX 4090",
            128,
            2.52e9,
            _tensor(165.2e12, 82.6e12),
            4.90e12,
            1.008e12,
            "Ada whitepaper (128 multiprocessors, 2520 MHz, 165.2 TFLOP/s into fp32, 1008 GB/s)",
        ),
    )
}
