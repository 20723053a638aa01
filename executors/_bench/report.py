"""The heading and the notes of the benchmark's tables, and its JSON."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from executors._bench.case import DENSE_WEIGHTS, FORWARD, LORA, WITH_BACKWARD, BenchCase, BenchRow
from executors._bench.ceilings import Ceilings
from executors._bench.measure import Spread, is_no_result, spread
from executors._bench.peers import gnf4, kt
from executors._bench.peers.bitsandbytes import STACK
from executors._bench.peers.liger import DISTRIBUTION, NAME, liger_version
from executors._bench.peers.transformers import PREFIX, peers_version
from executors._bench.quantised import MXFP4, bitsandbytes_version
from executors._bench.run import Findings
from executors._bench.settings import Settings
from executors._bench.table import rates
from executors._compare import report

SCHEMA = 1
BUSY = 0.5  # load average from which the reader is warned
WHERE = {FORWARD: "forward", WITH_BACKWARD: "with backward", LORA: "with adapters"}


def machine(settings: Settings) -> list[str]:
    """The machine, the weights where they are not dense, and who takes part."""
    found = report.machine()
    chip = report.chip(settings.device)
    transformers = _named(PREFIX, "transformers", peers_version())
    lines = [f"{chip}, {found['threads']} threads, torch {found['torch']}; {transformers}"]
    if settings.quantisation:
        bitsandbytes = _named("bnb:", "bitsandbytes", bitsandbytes_version())
        decoder = "torch: decodes with torch" if settings.quantisation.quant_type == MXFP4 else bitsandbytes
        lines.append(f"weights: {settings.quantisation}; {decoder}")
    if settings.gpu:
        own = (gnf4.NAME, gnf4.DISTRIBUTION, gnf4.gnf4_version())
        peer = own if settings.quantisation else (NAME, DISTRIBUTION, liger_version())
        lines.append(f"Triton {found['triton']}; {_named(*peer)}")
    elif kt.kt_version() and not settings.quantisation:
        lines.append(f"{_named(kt.NAME, kt.DISTRIBUTION, kt.kt_version())}, {kt.kt_variant()} variant")
    return lines


def _named(prefix: str, package: str, version: str | None) -> str:
    return f"{prefix} is {package} {version}" if version else f"{package} is not installed: no peers"


def heading(settings: Settings, ceilings: Ceilings) -> list[str]:
    """The lines above all tables."""
    busy = f"other work ran here before (load {settings.load:.1f}): do not trust the times"
    return [
        *machine(settings),
        f"ceilings: {ceilings.product} product {ceilings.tflops:.2f} TFLOP/s, copy {ceilings.copy_gbs:.0f} GB/s, "
        f"read {ceilings.read_gbs:.0f} GB/s",
        "+-: half of what lies between the 10th and 90th percentile of the times",
        *_ratios(settings),
        *(_ON_A_GPU if settings.gpu else _MEMORY if settings.memory else ()),
        *(_ROOF if settings.quantisation or (settings.memory and not settings.gpu) else ()),
        *(_INTERPRETED if settings.interpreted else ()),
        *([busy] if settings.load > BUSY else ()),
    ]


_RATIOS = (
    "x best: speed over that of the best peer; median, 10th and 90th percentile over",
    "the rounds. The best peer is timed twice in each round (see 'again'); the",
    "difference is the noise. ~: no result, the ratio lies within the noise",
)
_RATIOS_IN_4_BITS = (
    "x best: speed over that of the best peer. x stack: over that of",
    f"{STACK}, which decodes the whole stack in every call. Medians over",
    "the rounds. 10-90%: percentiles of x stack, or of x best where there is none.",
)
_BEST = "x best: speed over that of the best peer, median over the rounds"
_BF16 = f"x bf16: over that of {DENSE_WEIGHTS}, our kernels on decoded weights (medians)"
_RATIOS_TO_BF16 = (*_RATIOS_IN_4_BITS[:1], f"{STACK}, which decodes the whole stack in every call.", _BF16)
_NO_RESULT = (
    "The best peer is timed twice in each round (see 'again'); the difference is the",
    "noise. ~: no result, the ratio lies within the noise",
)


def _ratios(settings: Settings) -> tuple[str, ...]:
    if not settings.quantisation:
        return _RATIOS
    dense = settings.gpu and DENSE_WEIGHTS in settings.names
    if settings.quantisation.quant_type == MXFP4:  # no peer decodes its whole stack
        return (_BEST, *((_BF16,) if dense else ()), *_NO_RESULT)
    return (*(_RATIOS_TO_BF16 if dense else _RATIOS_IN_4_BITS), *_NO_RESULT)


_MEMORY = ("MiB: what a call takes at most above layer and input, in a process of its own",)
_ON_A_GPU = (
    "Timed by events from a cold L2 cache; 'in a graph' is captured and replayed.",
    "GB/s: active experts' weights once, x and y; its share is of the copy.",
    "n: kernels that a call launches. MiB: its peak above layer and input",
)
_INTERPRETED = ("[in brackets]: interpreted kernels, whose times are no measurement",)
_ROOF = ("roof: share of the ceiling of products (P) or of reading (R), the larger",)


def notes(cases: list[BenchCase]) -> list[str]:
    """Remarks on all rows, each once: not run, failed, or not measured, and why."""
    places: dict[tuple[str, str, str], list[BenchCase]] = {}
    for case in cases:
        for row in case.rows:
            for what, why in _remarks(row):
                places.setdefault((f"{row.name} {what}", case.shape.name, why), []).append(case)
    of_layer = {name: [case for case in cases if case.shape.name == name] for _, name, _ in places}
    return [f"{what} ({_where(found, of_layer[name])}): {why}" for (what, name, why), found in places.items()]


def _remarks(row: BenchRow) -> list[tuple[str, str]]:
    """Remarks on a row, each with its reason."""
    remarks = [
        ("not run", row.reason),
        ("not timed", row.untimed),
        ("memory not measured", row.no_peak),
        ("not captured in a graph", row.no_graph),
    ]
    if row.failed and row.judgement is not None:
        remarks.append(("FAILED", row.judgement.failure))
    return [(what, why) for what, why in remarks if why]


def _where(found: list[BenchCase], of_layer: list[BenchCase]) -> str:
    """The layer, and which of its cases if not all."""
    places = [found[0].shape.name]
    for direction in dict.fromkeys(case.direction for case in found):
        own = [case for case in found if case.direction == direction]
        others = [case for case in of_layer if case.direction == direction]
        if len(own) == len(others):
            places.append(WHERE[direction])
            continue
        routings = {case.routing for case in own} if len({case.routing for case in others}) > 1 else set()
        tokens = dict.fromkeys(case.tokens for case in own)
        places.append(" ".join(["T=" + ",".join(map(str, tokens)), WHERE[direction], *sorted(routings)]))
    return places[0] if len(found) == len(of_layer) else ", ".join(places)


def as_json(settings: Settings, found: Findings, seconds: float) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "schema": SCHEMA,
        "machine": report.machine(),
        "transformers": peers_version(),
        "bitsandbytes": bitsandbytes_version(),
        DISTRIBUTION: liger_version(),
        gnf4.DISTRIBUTION: gnf4.gnf4_version(),
        kt.DISTRIBUTION: {"version": kt.kt_version(), "variant": kt.kt_variant()} if kt.kt_version() else None,
        "quantisation": settings.quantisation.as_json() if settings.quantisation else None,
        "commit": commit(),
        "arguments": asdict(settings),
        "ceilings": asdict(found.ceilings),
        "seconds": seconds,
        "complete": found.complete,
        "left_out": found.left_out,
        "cases": [_case(case, found.ceilings) for case in found.cases],
    }


def commit() -> str | None:
    """The git commit of this package, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # a checkout around us, but of something else
    head = git("rev-parse", "HEAD")
    return head + "+" if head and git("status", "--porcelain", "--untracked-files=no") else head


def _case(case: BenchCase, ceilings: Ceilings) -> dict[str, Any]:
    best = case.best_peer()
    active, stack = case.decoded()
    return {
        **case.shape.as_json(),
        "T": case.tokens,
        "routing": case.routing,
        "direction": case.direction,
        "load": asdict(case.load) | {"active": case.active},
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "form": asdict(case.storage),
        "decoded_bytes": {"active": active, "stack": stack},
        "best_peer": best.name if best else None,
        "stack": case.stack if case.stack_row() else None,
        "control": control_json(case),
        "contenders": [_contender(case, row, ceilings) for row in case.rows],
    }


def control_json(case: BenchCase) -> dict[str, Any] | None:
    """The reference against itself."""
    control = case.control()
    return {"contender": case.reference, "seconds": case.again, "ratio": asdict(control)} if control else None


def row_json(row: BenchRow) -> dict[str, Any]:
    """What every benchmark says of a contender."""
    judgement = row.judgement
    return {
        "name": row.name,
        "ours": row.ours,
        "reason": row.reason,
        "passed": judgement is not None and not judgement.failure,
        "failure": judgement.failure if judgement else "",
        "max_z": {v.name: v.max_z for v in judgement.verdicts} if judgement else {},
        "seconds": row.seconds,
    }


def _contender(case: BenchCase, row: BenchRow, ceilings: Ceilings) -> dict[str, Any]:
    ratio, control = case.ratio(row), case.control()
    found: dict[str, Any] = {
        **row_json(row),
        "untimed": row.untimed,
        "interpreted": row.interpreted,
        "peak_bytes": row.peak,
        "launches": row.launches,
    }
    if row.seconds and not row.interpreted:
        found |= _speed(case, row.seconds, ratio, case.dense_ratio(row), ceilings)
        found["times_stack"] = _spread(case.stack_ratio(row))
        found["no_result"] = is_no_result(ratio, control) if ratio and control else None
        found["of_bandwidth"] = found["gbs"] / ceilings.gbs
    if row.graph:  # captured in a CUDA graph
        speed = _speed(case, row.graph, case.graph_ratio(row), case.dense_graph_ratio(row), ceilings)
        found["graph"] = {"reason": "", "seconds": row.graph} | speed
    elif row.no_graph:
        found["graph"] = {"reason": row.no_graph, "seconds": []}
    return found


def _speed(
    case: BenchCase, seconds: list[float], to_best: Spread | None, to_bf16: Spread | None, ceilings: Ceilings
) -> dict[str, Any]:
    time = spread(seconds)
    tflops, gbs = rates(case, time)
    return {
        "time": asdict(time),
        "times_best": _spread(to_best),
        "times_bf16": _spread(to_bf16),
        "tflops": tflops,
        "gbs": gbs,
        "of_product": tflops / ceilings.tflops,
        "of_copy": gbs / ceilings.copy_gbs,
    }


def _spread(found: Spread | None) -> dict[str, float] | None:
    return asdict(found) if found else None
