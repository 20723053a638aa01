"""Measures where honest executors lie within the gates, over a spread of shapes; the source of docs/tolerance.md.

python benchmarks/calibrate.py [--executor native] [--output benchmarks/results/calibration-cpu.json]
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import executors
from moe_ref import MoEConfig
from moe_ref.conformance.checks import check_problem
from moe_ref.conformance.gates import GAIN_SDS, MAX_Z, RMS_FROM, RMS_Z, Verdict
from moe_ref.conformance.honest import honest_variants
from moe_ref.conformance.problem import Problem
from moe_ref.conformance.strategies import DTYPES

GPT_OSS = MoEConfig(4, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
CLAMPED = replace(GPT_OSS, limit=0.5)
QWEN3 = MoEConfig(4, scoring="softmax", renormalize=True)
DEEPSEEK = MoEConfig(4, scoring="sigmoid", renormalize=True, routed_scaling_factor=2.5)

# (T, E, H, I): sums of 1 to 4096 terms, over features and over tokens.
SHAPES = (
    (1, 4, 1, 1),
    (1, 8, 64, 32),
    (7, 5, 17, 7),
    (64, 16, 64, 64),
    (64, 5, 512, 7),
    (64, 5, 7, 512),
    (16, 4, 4096, 16),
    (16, 4, 16, 4096),
    (512, 9, 50, 33),
    (4096, 32, 32, 16),
)


def problems(dtype: str) -> list[Problem]:
    """The spread for one dtype: every shape with every configuration, with biases, by logits and by ids."""
    found = []
    for tokens, experts, hidden, inner in SHAPES:
        for seed, config in enumerate((GPT_OSS, CLAMPED, QWEN3, DEEPSEEK)):
            problem = Problem(
                tokens, experts, hidden, inner, config, dtype, gate_up_bias=True, down_bias=True, seed=seed
            )
            found.append(replace(problem, entry=("layer", "experts")[seed % 2]))
    return found


def contenders(name: str) -> dict[str, executors.Executor]:
    """The executor and its honest variants."""
    executor = executors.get(name)
    return {name: executor, **honest_variants(executor)}


def measure(executor: str, dtypes: tuple[str, ...] = DTYPES) -> list[dict[str, object]]:
    """A row for each dtype and contender: the largest figure of each gate, forward and backward."""
    rows: list[dict[str, object]] = []
    everyone = contenders(executor)
    for dtype in dtypes:
        verdicts: dict[str, list[tuple[int, Verdict]]] = {name: [] for name in everyone}
        for problem in track(problems(dtype), description=dtype, console=Console(stderr=True)):
            slots = problem.tokens * problem.hidden
            for name, contender in everyone.items():
                verdicts[name] += [(slots, v) for v in check_problem(contender, problem)]
        for name, found in verdicts.items():
            for direction in ("forward", "backward"):
                chosen = [(n, v) for n, v in found if (v.name == "y") == (direction == "forward")]
                many = [v.rms_z for n, v in chosen if n >= RMS_FROM]
                rows.append(
                    {
                        "dtype": dtype,
                        "executor": name,
                        "direction": direction,
                        "tensors": len(chosen),
                        "max_z": max(v.max_z for _, v in chosen),
                        "rms_z": max(many),
                        "gain_z": max(abs(v.gain_z) for _, v in chosen),
                    }
                )
    return rows


def table(rows: list[dict[str, object]]) -> Table:
    """The rows, for a terminal."""
    out = Table(title=f"largest figures; the limits are max z {MAX_Z:g}, rms z {RMS_Z:g}, gain {GAIN_SDS:g}")
    for heading in ("dtype", "executor", "direction", "tensors"):
        out.add_column(heading)
    for heading in ("max z", "rms z", "gain z"):
        out.add_column(heading, justify="right")
    for row in rows:
        figures = [f"{row[k]:.2f}" for k in ("max_z", "rms_z", "gain_z")]
        out.add_row(*(str(row[k]) for k in ("dtype", "executor", "direction", "tensors")), *figures)
    return out


def main(
    executor: Annotated[str, typer.Option(help="Whose honest variants are measured beside it.")] = "native",
    output: Annotated[Path, typer.Option(help="Where the figures are written, as JSON.")] = Path(
        "benchmarks/results/calibration-cpu.json"
    ),
) -> None:
    """Measures where honest executors lie within the gates."""
    rows = measure(executor)
    Console().print(table(rows))
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    temporary.replace(output)


if __name__ == "__main__":
    typer.run(main)
