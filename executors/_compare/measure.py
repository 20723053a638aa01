"""Time and peak memory of executors on one layer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_ref.conformance.judgement.call import Inputs, call

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
            seconds = {"forward": _seconds(_forward, executor, inputs)}
            if executor.capabilities.backward:
                seconds["forward_backward"] = _seconds(forward_backward, executor, inputs)
            if number >= 0:
                for what, value in seconds.items():
                    times[name][what].append(value)
        progress()
    return times


def peak_memory(name: str, path: Path, seed: int, device: str, tokens: int | None) -> float | None:
    """Peak memory of one call, forward and backward, above what the layer itself takes.

    Each executor has a process of its own, so that none uses memory again that another one left.
    `executors._compare.memory` says how it measures.

    Returns:
        MiB, or None where it cannot be measured: not Linux with glibc, or an executor registered in this process only.
    """
    found, _ = in_a_process("executors._compare.memory", name, str(path), str(seed), device, str(tokens or 0))
    return float(found["peak_mib"]) if found else None


def in_a_process(module: str, *arguments: str, folder: Path | None = None) -> tuple[Any, str]:
    """The JSON that a module prints as its last line, and ""; or None, and why there is none.

    Args:
        module: as ``python -m`` takes it.
        arguments: of its command line.
        folder: where it runs, and where the module may be; None is here.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=MEMORY_TIMEOUT_S, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired:
        return None, f"took longer than {MEMORY_TIMEOUT_S} s"
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return None, said[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def forward_backward(executor: Executor, inputs: Inputs) -> None:
    """A call and its backward pass; the gradients stay where they are."""
    clear_gradients(inputs)
    torch.autograd.backward(call(executor, inputs), inputs.dy)


def clear_gradients(inputs: Inputs) -> None:
    """Gives back the memory of all gradients."""
    for leaf in inputs.tensors().values():
        leaf.grad = None


def _forward(executor: Executor, inputs: Inputs) -> None:
    with torch.no_grad():
        call(executor, inputs)


def _seconds(action: Callable[[Executor, Inputs], None], executor: Executor, inputs: Inputs) -> float:
    _wait(inputs)
    start = time.perf_counter()
    action(executor, inputs)
    _wait(inputs)
    return time.perf_counter() - start


def _wait(inputs: Inputs) -> None:
    if inputs.x.is_cuda:
        torch.cuda.synchronize(inputs.x.device)
