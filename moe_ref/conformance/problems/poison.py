"""Makes unwritten memory visible: inside `poisoned`, torch allocates NaN.

torch does so in its deterministic mode only, where operators and executors may take another path than users run. So an
executor is judged twice, once in each of `modes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.utils.deterministic as torch_memory

if TYPE_CHECKING:
    from executors import Executor

Mode = Callable[[], AbstractContextManager[None]]


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


SAYS: dict[Mode, str] = {  # what a failure that only one mode shows depends on
    poisoned: "where memory that nobody wrote is NaN, in torch's deterministic mode",
    nullcontext: "where torch's deterministic mode is off",
}


def modes(executor: Executor) -> tuple[Mode, ...]:
    """The contexts in which an executor is judged: with poisoned memory, and as users run it.

    Interpreted kernels take minutes for what a device does in no time, and are judged with poisoned memory only.
    """
    return (poisoned,) if executor.capabilities.interpreted else (poisoned, nullcontext)
