"""Makes unwritten memory visible: inside `poisoned`, torch allocates NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic as torch_memory


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills the results of torch.empty, its relatives and resize_ with NaN (integers: the largest value).

    torch does this itself in deterministic mode, also inside its own operators.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch_memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch_memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch_memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
