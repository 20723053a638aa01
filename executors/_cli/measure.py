"""Time and peak memory of executors on one layer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_ref.conformance.call import Inputs, call, run

if TYPE_CHECKING:
    from executors import Executor

WARM_UP = 2
MEMORY_TIMEOUT_S = 600


def measure_times(
    contenders: dict[str, tuple[Executor, Inputs]], repeats: int, progress: Callable[[], None]
) -> dict[str, dict[str, list[float]]]:
    """Times forward, and forward with backward, of all executors, interleaved, after a warm-up.

    Args:
        contenders: by name, the executor and its inputs.
        repeats: timed calls of each.
        progress: called after each round.

    Returns:
        By name, {"forward": [...], "forward_backward": [...]} in seconds.
    """
    times: dict[str, dict[str, list[float]]] = {n: {"forward": [], "forward_backward": []} for n in contenders}
    for number in range(-WARM_UP, repeats):
        for name, (executor, inputs) in contenders.items():
            seconds = {"forward": _seconds(lambda e=executor, i=inputs: _forward(e, i))}  # type: ignore[misc]
            if executor.capabilities.backward:
                seconds["forward_backward"] = _seconds(lambda e=executor, i=inputs: run(e, i))  # type: ignore[misc]
            if number >= 0:
                for what, value in seconds.items():
                    times[name][what].append(value)
        progress()
    return times


def peak_memory(name: str, path: Path, seed: int, device: str, tokens: int | None) -> float | None:
    """Peak memory of one call, forward and backward, above what the layer itself takes.

    On a GPU from the allocator's statistics; on a CPU from the peak resident set of a fresh process, so that nothing
    freed earlier is used again unseen.

    Returns:
        MiB, or None where it cannot be measured: no /proc, or an executor registered in this process only.
    """
    command = [sys.executable, "-m", "executors._cli.memory", name, str(path), str(seed), device, str(tokens or 0)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MEMORY_TIMEOUT_S, check=False)
    if done.returncode != 0:
        return None
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def _forward(executor: Executor, inputs: Inputs) -> None:
    with torch.no_grad():
        call(executor, inputs)


def _seconds(action: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    action()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
