"""One call for a profiler to watch: python benchmarks/gpu_profile.py DEVICE LAYER TOKENS DIRECTION [SCALE].

Calls ``triton`` on a layer of the benchmark, twice to warm up, and once between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import sys

import torch

from executors._bench.case import FORWARD
from executors._bench.contenders import action_of, our_contenders
from executors._bench.judge import clear_gradients
from executors._bench.layers import random_layer, sized
from executors._bench.routing import batch

WARM_UP = 2


def main(device: str, layer: str, tokens: str, direction: str, scale: str = "1") -> None:
    """Says what was called."""
    chosen = random_layer(sized(layer, int(scale), device), device, 0, lambda *_: None)
    given = batch("real", int(tokens), 0, chosen.shape, device, 0)
    (triton,) = our_contenders(chosen, given, ["triton"], admit_interpreted=True)
    reason = triton.why_not(int(tokens), direction != FORWARD)
    if reason or triton.call is None:
        sys.exit(f"triton, {direction}: {reason}")
    action = action_of(triton.call, given, direction)
    for _ in range(WARM_UP):
        action()
        clear_gradients(chosen, given)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    action()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
    print(f"called triton on {layer}, T={tokens}, {direction}")


if __name__ == "__main__":
    main(*sys.argv[1:])
