"""Compiled functions on several threads at once.

They let go of Python's lock, so Python's own threads do. OpenMP's, which torch has, would be a second set of them, and
each set waits busily on the other's cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any


def share(function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
    """Makes all calls, the last one on this thread."""
    if not calls:
        return
    *others, own = calls
    running = [_pool(os.getpid(), len(others)).submit(function, *call) for call in others]
    function(*own)
    for call in running:
        call.result()


@cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: after a fork the child has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="moe-ref")
