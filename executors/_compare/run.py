"""Runs every executor on one layer, judges it, and measures it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import executors
from executors._compare.judge import Truth, inputs_for, judge_executor
from executors._compare.measure import measure_times, peak_memory
from executors.layer_file import Layer
from moe_ref.conformance.judgement.call import Inputs
from moe_ref.conformance.judgement.faults import Judgement
from moe_ref.types import LEARNED

MILLISECONDS = 1000.0
PROCESSES = 2  # that measure memory at a time, mostly waiting for imports
FROM_IDS = "judged from ids on"  # of an executor without routing
LABELS = {"y": "y", "x": "dx"} | {name: f"d {name}" for name in ("router_logits", "topk_weights", *LEARNED)}


@dataclass(eq=False)
class CompareRow:
    """What came of one executor.

    Attributes:
        name: the executor.
        reason: why it did not run, or "".
        judgement: its verdicts, if it ran.
        seconds: timed calls, by "forward" and "forward_backward".
        peak_mib: peak memory of a call with backward, in MiB.
        note: what it declares not to offer, so that a pass is not mistaken for more than it is; or "".
    """

    name: str
    reason: str = ""
    judgement: Judgement | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: float | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ran and broke a clause."""
        return self.judgement is not None and bool(self.judgement.failure)

    def milliseconds(self, what: str) -> float | None:
        """The median of the timed calls."""
        samples = self.seconds.get(what)
        return MILLISECONDS * statistics.median(samples) if samples else None

    def worst(self) -> tuple[str, float | None]:
        """The tensor with the largest z, and that z; ("", None) where nothing was judged."""
        if self.judgement is None or not self.judgement.verdicts:
            return "", None
        verdict = max(self.judgement.verdicts, key=lambda v: v.max_z)
        return verdict.name, verdict.max_z


def everyone() -> list[str]:
    """All executors but "auto", which is one of the others."""
    return [name for name in executors.names() if name != "auto"]


def compare(
    layer: Layer,
    truth: Truth,
    names: list[str],
    repeats: int,
    seed: int,
    tokens: int | None,
    progress: Callable[[str], None],
) -> list[CompareRow]:
    """Judges and measures executors.

    Args:
        layer: the layer.
        truth: its exact answer.
        names: executors to run; one that cannot run gets a row with the reason.
        repeats: timed calls of each.
        seed: of the upstream gradient, for the processes that measure memory.
        tokens: how many of the file's tokens the layer was cut down to, or None.
        progress: called with a line on what is being done.
    """
    reasons = {row.name: row.reason for row in executors.explain(truth.inputs.x, truth.inputs.weights)}
    rows = [CompareRow(name, reason=reasons[name]) for name in names]
    timed: dict[str, tuple[executors.Executor, Inputs]] = {}
    for row in (row for row in rows if not row.reason):
        progress(f"judging {row.name}")
        try:
            executor = executors.get(row.name)
            row.judgement = judge_executor(executor, truth)
        except (executors.Unavailable, executors.Unsupported) as error:
            row.reason = " ".join(str(error).split())
            continue
        if not row.judgement.fault:
            row.note = _note(executor.capabilities)
            if not executor.capabilities.interpreted:
                timed[row.name] = executor, inputs_for(executor, truth)
    times = measure_times(timed, repeats, lambda: progress("timing"))
    device = str(truth.inputs.x.device)
    progress("memory")
    with ThreadPoolExecutor(PROCESSES if device == "cpu" else 1) as pool:
        peaks = list(pool.map(lambda name: peak_memory(name, layer.path, seed, device, tokens), timed))
    for row, peak in zip((row for row in rows if row.name in timed), peaks, strict=True):
        row.seconds, row.peak_mib = times[row.name], peak
    return rows


def _note(able: executors.Capabilities) -> str:
    """What an executor does not offer."""
    lacks = {
        "forward only": not able.backward,
        FROM_IDS: not able.routing,
        "interpreted, not timed": able.interpreted,
    }
    return ", ".join(text for text, lacking in lacks.items() if lacking)


def skew(group_sizes: np.ndarray) -> str:
    """How unevenly the tokens are spread, in a few words."""
    mean = group_sizes.mean()
    peak = group_sizes.max() / mean if mean else 0.0
    return f"busiest expert {peak:.1f} x the mean, {int((group_sizes == 0).sum())} without tokens"


def sizes(layer: Layer) -> dict[str, int]:
    """T, E, K, H, I."""
    w = layer.weights
    assert w.config.top_k is not None
    return {
        "T": layer.x.shape[0],
        "E": w.num_experts,
        "K": w.config.top_k,
        "H": w.hidden_size,
        "I": w.intermediate_size,
    }


def display(path: Path) -> str:
    """The path relative to this folder, or the name of a file elsewhere."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return path.name
