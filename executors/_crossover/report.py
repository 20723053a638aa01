"""The report of a crossover: tables in 80 columns, the suggested rule, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from executors._bench.case import LORA
from executors._bench.measure import Spread, spread
from executors._bench.report import commit as commit_of_git
from executors._bench.table import MILLISECONDS, relative
from executors._compare import report
from executors._crossover.points import DECODED, FUSED, CrossoverCurve, CrossoverPoint, Loss, best_bound, loss
from executors._crossover.run import CrossoverPlan

SCHEMA = 1
WAYS = (FUSED, DECODED, "torch", "bf16")
DIRECTIONS = {"forward": "forward", LORA: "forward + backward with adapters, base frozen"}
MEANINGLESS = "interpreted: times mean nothing, and nothing is suggested"


def heading(plan: CrossoverPlan) -> list[str]:
    """The lines above all tables."""
    return [
        conditions(plan),
        f"the rule of {plan.family} at present: fused up to {plan.rule.rows:g} rows per expert,",
        plan.rule.basis,
        "rows: mean of an expert. Times in ms: grouped_nf4[fused], [decoded], [torch],",
        "and triton in bf16 on weights decoded before. +-: half of what lies between",
        "the 10th and 90th percentile. ratio: decoded over fused, median over the",
        "rounds. '~': no result, the ratio lies within the noise",
        *([MEANINGLESS] if plan.interpreted else []),
    ]


def conditions(plan: CrossoverPlan) -> str:
    """The machine and the routing, in one line."""
    found = report.machine()
    return f"{report.chip(plan.device)}, torch {found['torch']}, Triton {found['triton']}; {plan.routing} routing"


def title(curve: CrossoverCurve) -> str:
    """Two lines on the layer and the direction."""
    return f"{curve.shape}\n{curve.weights}, {DIRECTIONS[curve.direction]}"


def table(curve: CrossoverCurve, interpreted: bool) -> Table:
    """A row for each number of rows per expert."""
    out = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("rows", "T", "max z", FUSED, "+-", DECODED, "+-", "torch", "bf16", "ratio", "10-90%", "wins"):
        out.add_column(name, justify="left" if name == "wins" else "right", no_wrap=True)
    for point in curve.points:
        cells = [f"{point.rows:g}", str(point.tokens), _max_z(point)]
        for way in WAYS:
            cells += _times(point, way, interpreted)[: 2 if way in (FUSED, DECODED) else 1]
        out.add_row(*(escape(cell) for cell in (*cells, *_ratio(point, interpreted))))
    return out


def found(curve: CrossoverCurve, interpreted: bool) -> str:
    """The crossover in a line."""
    if interpreted or not curve.points:
        return "crossover: not measured"
    won, lost = curve.crossover()
    parts = [
        "fused wins nowhere" if won is None else f"fused wins up to {won:g} rows",
        "decoded wins nowhere" if lost is None else f"decoded wins from {lost:g} on",
    ]
    return f"crossover: {', '.join(parts)}"


def remarks(curves: Sequence[CrossoverCurve]) -> list[str]:
    """What failed, and why contenders were not timed, each once."""
    places: dict[str, list[str]] = {}
    for curve in curves:
        for point in curve.points:
            lines = [f"FAILED {point.failure}"] if point.failure else []
            lines += [f"{way} not timed: {why}" for way, why in point.reasons.items() if why]
            for line in lines:
                where = f"{curve.shape.name} in {curve.weights}, {curve.direction}"
                places.setdefault(f"{line} ({where}", []).append(f"{point.rows:g}")
    return [f"{line}, rows {','.join(rows)})" for line, rows in places.items()]


def suggestion(plan: CrossoverPlan, curves: Sequence[CrossoverCurve]) -> list[str]:
    """The line for the table of rules, and what it loses; or why there is none."""
    if plan.interpreted:
        return ["no rule is suggested: the kernels were interpreted"]
    complete = [curve for curve in curves if curve.complete]
    bound = best_bound(complete)
    if bound is None:
        return ["no rule is suggested: no curve is complete"]
    own, present = loss(complete, bound), loss(complete, plan.rule.rows)
    largest = max(point.rows for curve in complete for point in curve.points)
    return [
        f"over {len(complete)} of {len(curves)} curves, what a rule takes longer than the faster way:",
        f"  fused up to {bound:g} rows: {_loss(own)}",
        f"  at present, up to {plan.rule.rows:g}: {_loss(present)}",
        *([f"  fused wins up to the most rows that were measured: {largest:g}"] if bound == largest else []),
        "suggested for RULES in executors/_triton/decode_rule.py:",
        f'    "{plan.family}": Rule({bound:g}, "measured: {torch.cuda.get_device_name(plan.device)}"),',
    ]


def as_json(
    plan: CrossoverPlan,
    curves: Sequence[CrossoverCurve],
    left_out: list[str],
    complete: bool,
    commit: str | None,
    seconds: float,
) -> dict[str, Any]:
    """Everything that was measured."""
    done = [curve for curve in curves if curve.complete]
    bound = None if plan.interpreted else best_bound(done)
    return {
        "schema": SCHEMA,
        "machine": report.machine(),
        "commit": commit or commit_of_git(),
        "arguments": asdict(plan),
        "interpreted": plan.interpreted,
        "family": plan.family,
        "rule": {"rows": plan.rule.rows, "basis": plan.rule.basis, "loss": asdict(loss(done, plan.rule.rows))},
        "suggested": None if bound is None else {"rows": bound, "loss": asdict(loss(done, bound))},
        "seconds": seconds,
        "complete": complete,
        "left_out": left_out,
        "curves": [_curve(curve, plan.interpreted) for curve in curves],
    }


def _curve(curve: CrossoverCurve, interpreted: bool) -> dict[str, Any]:
    won, lost = (None, None) if interpreted else curve.crossover()
    return {
        **curve.shape.as_json(),
        "weights": curve.weights,
        "direction": curve.direction,
        "complete": curve.complete,
        "fused_up_to": won,
        "decoded_from": lost,
        "points": [_point(point, interpreted) for point in curve.points],
    }


def _point(point: CrossoverPoint, interpreted: bool) -> dict[str, Any]:
    def times(samples: list[float]) -> dict[str, Any]:
        time = spread(samples)
        rates = {"tflops": point.tflop / time.median, "gbs": point.size / time.median / 1e9}
        return {"seconds": samples} | ({} if interpreted else {"time": asdict(time)} | rates)

    def over_fused(name: str) -> dict[str, float] | None:
        ratio = None if interpreted else point.ratio(name)
        return asdict(ratio) if ratio else None

    control = point.control()
    return {
        "rows": point.rows,
        "T": point.tokens,
        "contenders": {way: times(samples) for way, samples in point.seconds.items()},
        "reasons": point.reasons,
        "max_z": point.max_z,
        "failure": point.failure,
        "over_fused": {way: over_fused(way) for way in WAYS if way != FUSED},
        "control": asdict(control) | {"contender": point.reference} if control else None,
        "winner": None if interpreted else point.winner or None,
    }


def _loss(own: Loss) -> str:
    return f"{own.mean:.1%} on average, {own.worst:.1%} at most"


def _times(point: CrossoverPoint, way: str, interpreted: bool) -> list[str]:
    """The median in ms, and the spread."""
    if way not in point.seconds:
        return ["-", ""]
    time = spread(point.seconds[way])
    value = MILLISECONDS * time.median
    text = f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"
    if interpreted:
        return [f"[{text}]", ""]
    return [text, relative(time)]


def _ratio(point: CrossoverPoint, interpreted: bool) -> list[str]:
    ratio = point.ratio()
    if point.failure:
        return ["", "", "FAIL"]
    if interpreted or ratio is None:
        return ["", "", ""]
    text = _short(ratio.median)
    return [text if point.winner else f"~{text}", _range(ratio), point.winner or "~"]


def _range(ratio: Spread) -> str:
    return f"{_short(ratio.low)}-{_short(ratio.high)}"


def _short(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1}f}"


def _max_z(point: CrossoverPoint) -> str:
    return f"{max(point.max_z.values()):.1f}" if point.max_z else ""
