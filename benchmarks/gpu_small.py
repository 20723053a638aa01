"""Small problems, judged: what compute-sanitizer watches. python benchmarks/gpu_small.py DEVICE EXECUTOR...

Forward, and backward where the executor has it; aligned sizes, tails in every dimension, transposed weights, biases.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import executors
from moe_ref import MoEConfig
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.problems.problem import Problem

CLAMPED = MoEConfig(2, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
ALIGNED = Problem(8, 4, 32, 16, MoEConfig(2), "bfloat16")
TAILS = Problem(5, 3, 24, 13, CLAMPED, "float16", gate_up_bias=True, down_bias=True, weights_layout="transposed")
ON_A_GPU = (replace(ALIGNED, tokens=200, hidden=256, intermediate=128), replace(TAILS, tokens=70, dtype="float32"))


def main(device: str, *names: str) -> None:
    """Says what was judged; a broken clause ends it."""
    problems = (ALIGNED, TAILS, *(ON_A_GPU if device == "cuda" else ()))
    directions = []
    for name in names:
        executor = executors.get(name)
        for problem in problems:
            check_problem(executor, problem, device)
        directions.append(f"{name} {'forward + backward' if executor.capabilities.backward else 'forward'}")
    print(f"{len(problems)} problems right on {device}: {', '.join(directions)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
