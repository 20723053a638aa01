"""Measures one executor's peak memory in a process of its own: ``python -m executors._cli.memory NAME FILE ...``.

On a GPU: the allocator's peak. On a CPU: how far the peak resident set of the second call passes the resident set
before it. The first call is not counted: it loads code and fills caches of compiled kernels (for bf16 products that is
80 MiB, whatever the layer). Before the second one the heap is given back, or what the first call freed would be used
again unseen; and large blocks are mapped one by one, so that the resident set follows what is allocated.
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
from executors._cli.judge import inputs_for, unjudged
from executors._cli.layer_file import first_tokens, load_layer
from executors._cli.measure import forward_backward
from moe_ref.conformance.call import Inputs, call

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MAPPED_FROM = 64 * 1024  # bytes; also keeps glibc from raising the threshold by itself


def main(name: str, path: str, seed: str, device: str, tokens: str) -> None:
    """Prints {"peak_mib": ...} as the last line."""
    executor = executors.get(name)
    layer = first_tokens(load_layer(Path(path), device), int(tokens) or None)
    inputs = inputs_for(executor, unjudged(layer, int(seed)))
    measure = allocated_peak if inputs.x.is_cuda else resident_peak
    print(json.dumps({"peak_mib": measure(lambda: _act(executor, inputs), inputs) / MIB}))


def _act(executor: Executor, inputs: Inputs) -> None:
    if executor.capabilities.backward:
        forward_backward(executor, inputs)
    else:
        call(executor, inputs)


def allocated_peak(action: Callable[[], None], inputs: Inputs) -> int:
    """Bytes by which the CUDA allocator's peak passes what was allocated before."""
    device = inputs.x.device
    action()
    _drop_gradients(inputs)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


def resident_peak(action: Callable[[], None], inputs: Inputs) -> int:
    """Bytes by which the peak resident set passes the resident set before; Linux with glibc only."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    action()
    _drop_gradients(inputs)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _drop_gradients(inputs: Inputs) -> None:
    for leaf in inputs.tensors().values():
        leaf.grad = None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
