"""What the tests of ``bench --ranks`` run in its processes."""

from __future__ import annotations

import os
import time
from typing import Any

import torch.distributed as dist

import executors
from executors._bench.ranks.run import measure
from moe_ref.conformance.mutants import mutants


def raising(_tell: Any, exit_status: int) -> None:
    """The last rank raises, or ends if there is an exit status; the others wait for it."""
    if dist.get_rank() == dist.get_world_size() - 1:
        if exit_status:
            os._exit(exit_status)
        raise MemoryError("out of\nmemory")
    dist.barrier()


def sleeping(tell: Any) -> None:
    """Tells its process, and goes on for long."""
    tell(os.getpid())
    time.sleep(600)


def spoiled(tell: Any, settings: Any, mutant: str) -> None:
    """Measures with a wrong executor of the name "mutant" on the last rank, which is right on the others."""
    last = dist.get_rank() == dist.get_world_size() - 1
    native = executors.get("native")
    executors.register("mutant", lambda: mutants(native)[mutant] if last else native)
    measure(tell, settings)
