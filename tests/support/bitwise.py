"""Numbers bit for bit, and awkward ones."""

from __future__ import annotations

import math

import torch


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for what bits a NaN has."""
    assert found.dtype == expected.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = bits(found.nan_to_num(7.0)), bits(expected.nan_to_num(7.0))
    assert torch.equal(found, expected), (found, expected)


def special(dtype: torch.dtype, count: int = 256) -> torch.Tensor:
    """Numbers of all sizes, subnormal, infinite and undefined ones, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, generator=generator) * 2.0 ** torch.randint(-30, 30, (count,), generator=generator)
    out = drawn.to(dtype)
    tiny = torch.finfo(dtype).tiny
    edges = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny, tiny / 2, -tiny / 4, torch.finfo(dtype).max, 1.0]
    out[: len(edges)] = torch.tensor(edges, dtype=torch.float64).to(dtype)
    return out
