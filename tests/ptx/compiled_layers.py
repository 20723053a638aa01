"""What the kernels of a layer with eight rows an expert ask of a GPU's units: counted, so that a regression shows.

The figures are in docs/performance-log.md; each limit here has a small margin over them.
"""

from typing import NamedTuple

import pytest
import torch

from executors._bench.layers import LAYERS
from executors._counts.fit import Sizes
from executors._counts.slices import Slice, count


class Limits(NamedTuple):
    """At most so many warp instructions of the text for each mma, and sectors of loads over the fewest."""

    instructions: float
    sectors: float


# K is 2048 in up, a real one, and 128 in down, where what stands around the loop weighs most.
LIMITS = {
    "": {"up": Limits(8.0, 1.01), "down": Limits(30.8, 1.06)},
    "nf4-nested": {"up": Limits(39.5, 1.39), "down": Limits(59.5, 1.27)},
    "mxfp4": {"up": Limits(36.9, 1.13), "down": Limits(53.2, 1.13)},
}


@pytest.mark.parametrize("packed", LIMITS)
def test_few_rows(packed: str) -> None:
    """No bank conflict, few instructions for each mma, few sectors beside those that are needed."""
    found = count(Slice(LAYERS["qwen3-30b-a3b"], Sizes(8, 2048, 128, 4), 8, torch.bfloat16, packed, False))
    for label, limits in LIMITS[packed].items():
        counts = found[label]
        loads = [own for own in counts.instructions if own.sectors and own.name.startswith(("ld.", "cp."))]
        needed = sum(own.ideal_sectors for own in loads)
        assert counts.total("wavefronts") == counts.total("ideal_wavefronts"), label
        assert counts.total("warps") / counts.total("warps", "tensor") < limits.instructions, label
        assert sum(own.sectors for own in loads) / needed < limits.sectors, label


def test_no_bank_conflicts_with_biases() -> None:
    """In no kernel of forward and backward: gpt-oss' form, whose matrices are stored by columns."""
    found = count(Slice(LAYERS["gpt-oss-20b"], Sizes(4, 256, 128, 4), 8, torch.bfloat16, "", True))
    conflicts = {label: own.total("wavefronts") - own.total("ideal_wavefronts") for label, own in found.items()}
    assert conflicts.keys() >= {"up", "down", "outer up", "outer down", "sums up", "sums down"}
    assert not any(conflicts.values()), conflicts
