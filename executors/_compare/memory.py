"""Measures one executor's peak memory in a process of its own: ``python -m executors._compare.memory NAME FILE ...``.

On a GPU: the allocator's peak. On a CPU: how far the peak resident set of the second call passes the resident set
before it. The first call is not counted: it loads code and fills caches of compiled kernels (for bf16 products that is
80 MiB, whatever the layer). Before the second call the heap is given back to the system; otherwise that call could use
again what the first one freed, unseen. Large blocks are mapped one by one, so the resident set follows allocations.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import executors
from executors import Executor
from executors._compare.judge import inputs_for, unjudged
from executors._compare.measure import clear_gradients, forward_backward
from executors.layer_file import first_tokens, load_layer
from moe_ref.conformance.judgement.call import Inputs, call

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MAPPED_FROM = 64 * 1024  # bytes; also keeps glibc from raising the threshold by itself


def main(name: str, path: str, seed: str, device: str, tokens: str) -> None:
    """Prints {"peak_mib": ...} as the last line."""
    executor = executors.get(name)
    layer = first_tokens(load_layer(Path(path), device), int(tokens) or None)
    inputs = inputs_for(executor, unjudged(layer, int(seed)))
    peak = peak_of(lambda: _act(executor, inputs), lambda: clear_gradients(inputs), device)
    print(json.dumps({"peak_mib": peak / MIB}))


def _act(executor: Executor, inputs: Inputs) -> None:
    if executor.capabilities.backward:
        forward_backward(executor, inputs)
    else:
        call(executor, inputs)


def peak_of(action: Callable[[], None], clear: Callable[[], None], device: str) -> int:
    """Bytes that the second of two calls takes at most, above what was taken before it.

    Args:
        action: the call.
        clear: drops what the first call left.
        device: where it runs.
    """
    if torch.device(device).type == "cuda":
        return _allocated_peak(action, clear, device)
    return _resident_peak(action, clear)


def _allocated_peak(action: Callable[[], None], clear: Callable[[], None], device: str) -> int:
    action()
    clear()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(action: Callable[[], None], clear: Callable[[], None]) -> int:
    """Linux with glibc only."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    action()
    clear()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
