"""Measures where honest executors lie within the gates, over a spread of shapes; the source of docs/tolerance.md.

python benchmarks/calibrate.py [--out benchmarks/results] [--name calibration-cpu] [--device cpu]
"""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import executors
from executors._compare.plot import save
from executors._files.whole import write_json
from moe_ref import MoEConfig
from moe_ref.conformance.honest import honest_variants
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.gates import GAIN_SDS, MAX_Z, RMS_FROM, RMS_Z, Verdict
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import DTYPES

GPT_OSS = MoEConfig(4, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
CLAMPED = replace(GPT_OSS, limit=0.5)
QWEN3 = MoEConfig(4, scoring="softmax", renormalize=True)
DEEPSEEK = MoEConfig(4, scoring="sigmoid", renormalize=True, routed_scaling_factor=2.5)
LLAMA4 = MoEConfig(1, scoring="sigmoid", scale_input=True)
GEMMA = MoEConfig(2, scoring="softmax", renormalize=True, activation="geglu_tanh")
NEMOTRON = MoEConfig(4, scoring="sigmoid", renormalize=True, activation="relu2")
CONFIGS = (GPT_OSS, CLAMPED, QWEN3, DEEPSEEK, LLAMA4, GEMMA, NEMOTRON)

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

GATES = {"max_z": MAX_Z, "rms_z": RMS_Z, "gain_z": GAIN_SDS}
DIRECTIONS = ("forward", "backward")


def problems(dtype: str) -> list[Problem]:
    """The spread for one dtype: every shape with every configuration, by logits and by ids, adapters on every third."""
    found = []
    for tokens, experts, hidden, inner in SHAPES:
        for seed, config in enumerate(CONFIGS):
            if config is DEEPSEEK and experts % 4 == 0:
                config = replace(config, num_groups=2, topk_groups=2, group_score="top2_sum")
            problem = Problem(
                tokens, experts, hidden, inner, config, dtype, gate_up_bias=True, down_bias=True, seed=seed
            )
            by_logits = seed % 2 == 0 or config.num_groups > 1
            adapters = {"gate_up_rank": 4, "down_rank": 3} if seed % 3 == 2 else {}
            bias = "small" if config.num_groups > 1 else ""
            entry = "layer" if by_logits else "experts"
            found.append(replace(problem, entry=entry, selection_bias=bias, **adapters))
    return found


def contenders(dtype: str) -> dict[str, executors.Executor]:
    """The executors that take the dtype, and the honest variants of ``native``."""
    found = {name: executors.get(name) for name in executors.available() if name != "auto"}
    found |= honest_variants(executors.get("native"))
    return {name: executor for name, executor in found.items() if dtype in executor.capabilities.dtypes}


def measure(dtypes: tuple[str, ...], device: str) -> list[dict[str, Any]]:
    """A row for each dtype, contender and direction, with each gate's figures."""
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        everyone = contenders(dtype)
        verdicts: dict[str, list[tuple[int, Verdict]]] = {name: [] for name in everyone}
        for problem in track(problems(dtype), description=dtype, console=Console(stderr=True)):
            elements = problem.tokens * problem.hidden
            for name, contender in everyone.items():
                verdicts[name] += [(elements, v) for v in check_problem(contender, problem, device)]
        for name, found in verdicts.items():
            for direction in DIRECTIONS:
                chosen = [(n, v) for n, v in found if (v.name == "y") == (direction == "forward")]
                figures = {
                    "max_z": [v.max_z for _, v in chosen],
                    "rms_z": [v.rms_z for n, v in chosen if n >= RMS_FROM],
                    "gain_z": [abs(v.gain_z) for _, v in chosen],
                }
                row = {"dtype": dtype, "executor": name, "direction": direction, "tensors": len(chosen)}
                rows.append(row | {gate: spread(values) for gate, values in figures.items()})
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, quartiles, 99th percentile and largest."""
    places = {"least": 0, "low": 25, "median": 50, "high": 75, "most": 99, "largest": 100}
    return {name: round(float(np.percentile(values, place)), 4) for name, place in places.items()}


def plot(path: Path, rows: list[dict[str, Any]], heading: str) -> None:
    """A panel for each gate: for each dtype and direction the spread over all tensors of all contenders."""
    from matplotlib.figure import Figure

    labels = [(dtype, direction) for dtype in DTYPES for direction in DIRECTIONS]
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    titles = {"max_z": "max |z| of a tensor", "rms_z": "rms z of a tensor", "gain_z": "|gain| in its deviations"}
    for axes, (gate, limit) in zip(figure.subplots(3, 1, sharex=True), GATES.items(), strict=True):
        for place, (dtype, direction) in enumerate(labels):
            same = [row for row in rows if (row["dtype"], row["direction"]) == (dtype, direction)]
            for number, row in enumerate(same):
                x = place + (number - (len(same) - 1) / 2) * 0.12
                at = row[gate]
                colour = "tab:blue" if direction == "forward" else "tab:orange"
                axes.plot([x, x], [at["low"], at["high"]], color=colour, linewidth=4, solid_capstyle="butt")
                axes.plot([x, x], [at["least"], at["most"]], color=colour, linewidth=1)
                axes.plot(x, at["largest"], ".", color=colour, markersize=5)
        axes.axhline(limit, color="tab:red", linewidth=1, linestyle="--")
        axes.text(len(labels) - 0.4, limit, f"limit {limit:g} ", color="tab:red", ha="right", va="bottom", fontsize=8)
        axes.set(ylabel=titles[gate], ylim=(0, limit * 1.18))
        axes.grid(axis="y", alpha=0.3)
    axes.set_xticks(range(len(labels)), [f"{dtype}\n{direction}" for dtype, direction in labels], fontsize=8)
    save(figure, path, 110)


def table(rows: list[dict[str, Any]]) -> Table:
    """The largest figures, for a terminal."""
    out = Table(title=f"largest figures; the limits are max z {MAX_Z:g}, rms z {RMS_Z:g}, gain {GAIN_SDS:g}")
    for heading in ("dtype", "executor", "direction", "tensors"):
        out.add_column(heading)
    for heading in ("max z", "rms z", "gain z"):
        out.add_column(heading, justify="right")
    for row in rows:
        figures = [f"{row[gate]['largest']:.2f}" for gate in GATES]
        out.add_row(*(str(row[k]) for k in ("dtype", "executor", "direction", "tensors")), *figures)
    return out


def main(
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("benchmarks/results"),
    name: Annotated[str, typer.Option(help="Of the two files, NAME.json and NAME.png.")] = "calibration-cpu",
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
) -> None:
    """Measures where honest executors lie within the gates."""
    rows = measure(tuple(dtype or DTYPES), device)
    Console(width=100).print(table(rows))
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", {"machine": machine, "rows": rows})
    count = len(problems("float32"))
    heading = f"honest executors within the gates: {count} problems a dtype, torch {torch.__version__}"
    plot(out / f"{name}.png", rows, heading)


if __name__ == "__main__":
    typer.run(main)
