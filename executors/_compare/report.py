"""The table for people, and the JSON for programs."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from executors._compare.judge import Truth
from executors._compare.run import FROM_IDS, LABELS, CompareRow, sizes, skew
from executors.layer_file import Layer
from moe_ref.conformance.judgement.faults import Judgement
from moe_ref.conformance.judgement.gates import Verdict
from moe_ref.validation import dtype_name

SCHEMA = 1
LONGEST_NAME = 20
MEANING = "it has no routing of its own, and is given topk_ids and topk_weights"


def table(rows: list[CompareRow]) -> Table:
    """One row for each executor, in 80 columns. `below` has what does not fit."""
    out = Table(width=80)
    out.add_column("executor", overflow="fold", max_width=LONGEST_NAME)
    out.add_column("verdict", ratio=1, overflow="fold")
    for heading in ("max z", "forward\nms", "+backward\nms", "peak\nMiB"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.judgement is None:
            out.add_row(escape(row.name), "[dim]not run[/dim]", "", "", "", "")
            continue
        out.add_row(
            escape(row.name),
            _verdict(row),
            _figure(row.worst()[1]),
            _figure(row.milliseconds("forward")),
            _figure(row.milliseconds("forward_backward")),
            _figure(row.peak_mib),
        )
    return out


def below(rows: list[CompareRow]) -> list[str]:
    """What stands below the table: what is wrong, why an executor did not run, and what a remark means."""
    wrong = [f"{row.name}: {failed(row.judgement)}" for row in rows if row.judgement and row.failed]
    reasons = [f"{row.name}: not run: {row.reason}" for row in rows if row.judgement is None]
    notes = [f"{FROM_IDS}: {MEANING}"] if any(FROM_IDS in row.note for row in rows) else []
    return wrong + reasons + notes


def failed(judgement: Judgement) -> str:
    """The failure of the worst tensor in full, and the names of the others that fail."""
    others = [] if judgement.fault else [f"{LABELS[v.name]} ({gate(v)})" for v in judgement.broken[1:]]
    return judgement.failure + (f"; also {', '.join(others)}" if others else "")


def gate(verdict: Verdict) -> str:
    """The gate that a tensor failed, with its figure: "max z 7.9"; or that its numbers are of another kind."""
    if found := re.search(r"(max|gain) z [^,]+(?=, limit)|rms z=[^,]+", verdict.failure):
        return found[0].replace("=", " ")
    return "not exactly 0" if verdict.zero else "NaN, infinity or shape"


def heading(layer: Layer, truth: Truth, name: str) -> str:
    """Two lines on the layer, and a third where tokens lie at the clamp's limit."""
    numbers = ", ".join(f"{letter}={value}" for letter, value in sizes(layer).items())
    lines = [f"{name}: {numbers}, {dtype_name(layer.x)}", f"routing: {skew(truth.group_sizes)}"]
    if truth.near_limit:
        lines.append(f"left out of the gradients, within rounding of the clamp's limit: {truth.near_limit} tokens")
    return "\n".join(lines)


def as_json(layer: Layer, truth: Truth, rows: list[CompareRow], arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "layer": {
            "file": layer.path.name,
            "sha256": layer.sha256,
            "source": layer.source,
            "dtype": dtype_name(layer.x),
            **sizes(layer),
            "config": asdict(layer.weights.config),
            "group_sizes": truth.group_sizes.tolist(),
            "tokens_near_limit": truth.near_limit,
        },
        "arguments": arguments,
        "executors": [_row(row) for row in rows],
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numpy": np.__version__,
    }


def chip(device: str) -> str:
    """The GPU, or the processor where the device is none."""
    return machine()["gpu" if device.startswith("cuda") else "processor"]


def version_of(distribution: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _row(row: CompareRow) -> dict[str, Any]:
    judgement = row.judgement
    return {
        "executor": row.name,
        "ran": judgement is not None,
        "reason": row.reason,
        "passed": judgement is not None and not judgement.failure,
        "failure": judgement.failure if judgement else "",
        "note": row.note,
        "tensors": [asdict(v) for v in judgement.verdicts] if judgement else [],
        "seconds": row.seconds,
        "peak_mib": row.peak_mib,
    }


def _verdict(row: CompareRow) -> str:
    """A word, the clauses of which one is broken, whether y is, and a remark."""
    judgement = row.judgement
    assert judgement is not None
    if judgement.fault:
        parts = [f"[red]FAIL[/red] {escape(judgement.fault.split(':')[0])}"]
    elif broken := judgement.broken:
        parts = [f"[red]FAIL[/red] {broken[0].clauses}", "in y" if broken[0].name == "y" else "in gradients"]
    else:
        parts = ["[green]pass[/green]"]
    return "\n".join(parts + ([row.note] if row.note else []))


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
