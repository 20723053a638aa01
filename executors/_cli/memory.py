"""Measures one executor's peak memory in a process of its own: ``python -m executors._cli.memory NAME FILE ...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import executors
from executors._cli.judge import inputs_for, unjudged
from executors._cli.layer_file import first_tokens, load_layer
from moe_ref.conformance.call import run

MIB = 2**20


def main(name: str, path: str, seed: str, device: str, tokens: str) -> None:
    """Prints {"peak_mib": ...} as the last line."""
    executor = executors.get(name)
    layer = first_tokens(load_layer(Path(path), device), int(tokens) or None)
    truth = unjudged(layer, int(seed))
    inputs = inputs_for(executor, truth)
    tiny = unjudged(first_tokens(layer, 1), int(seed))
    run(executor, inputs_for(executor, tiny), executor.capabilities.backward)  # loads code, not data
    if device == "cpu":
        peak = _resident_growth(lambda: run(executor, inputs, executor.capabilities.backward))
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(executor, inputs, executor.capabilities.backward)
        peak = torch.cuda.max_memory_allocated() - before
    print(json.dumps({"peak_mib": peak / MIB}))


def _resident_growth(action) -> int:  # type: ignore[no-untyped-def]
    """Bytes by which the peak resident set passes the resident set before; Linux counts both in /proc."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    result = action()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
