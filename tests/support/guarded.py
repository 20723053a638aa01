"""Memory between guard bands: who writes beyond what was allocated is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

BAND = 4096  # elements on either side


@contextmanager
def guarded() -> Iterator[list[Tensor]]:
    """Within it, torch.empty and torch.empty_like hand out memory full of NaN, with bands of it on both sides.

    Integers are filled with their largest value. Gives the list of what was allocated, bands included.

    Raises:
        AssertionError: at the end, if a band was written to, or nothing was allocated.
    """
    allocated: list[Tensor] = []

    def around(plain: Any) -> Any:
        def allocate(*args: Any, **options: Any) -> Tensor:
            out = plain(*args, **options)
            whole = torch.full((out.numel() + 2 * BAND,), _filler(out), dtype=out.dtype, device=out.device)
            allocated.append(whole)
            return whole.as_strided(out.shape, out.stride(), BAND)

        return allocate

    with patch.object(torch, "empty", around(torch.empty)), patch.object(torch, "empty_like", around(torch.empty_like)):
        yield allocated
    assert allocated, "nothing was allocated"
    for whole in allocated:
        for band in (whole[:BAND], whole[-BAND:]):
            same = band.isnan() if band.is_floating_point() else band == _filler(band)
            assert bool(same.all()), f"written beyond {len(whole) - 2 * BAND} elements of {whole.dtype}"


def _filler(tensor: Tensor) -> float:
    return torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
