"""The table for people, and the JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from executors._counts.bounds import bound_by, bounds, issued, l2_bytes
from executors._counts.fit import FIELDS, Sizes
from executors._counts.run import LayerCounts
from executors._counts.slices import TARGET
from moe_ref.conformance.ptx.counters import KernelCounts

SCHEMA = 1
MB = 1e6
SHORT = {"issue": "issue", "tensor": "tensor", "shared": "shared", "l2": "L2", "dram": "DRAM"}
MICROSECOND = 1e-6
WORTH_SAYING = 1e-4  # a difference: a few sectors at the ends of tensors are less
LOST = 0.1  # of all: less is not worth a line
SHOWN = 0.01  # of the longest kernel's time
NOTES = """\
/mma: instructions of a warp for each tensor-core instruction, without moves and
  parameters, which an assembler folds; int: share of those on integers
banks: passes of shared memory, of the fewest; sectors: of 32 bytes, the same
MB: read and written, each byte once a launch; bar: barriers of a program
µs: the least time of the busiest unit, at its full rate, by which the kernel is
  bound: no prediction, as nothing waits. The text is that of {target}"""


def heading(found: LayerCounts) -> list[str]:
    """What was counted, and how."""
    plan, shape = found.plan, found.plan.shape
    direction = "forward and backward" if plan.backward else "forward"
    asked = f" (for T={plan.tokens})" if plan.counted_tokens != plan.tokens else ""
    lines = [
        f"{shape.name}: E={shape.experts} K={shape.top_k} H={shape.hidden} I={shape.intermediate}, "
        f"{plan.weights}, {direction}",
        f"{plan.active} experts, {plan.rows} rows of each, T={plan.counted_tokens}{asked}; rates: {plan.card.title}",
        f"executed, ExHxI: {', '.join(map(_short, found.slices))}",
    ]
    if found.beyond is not None:
        off = [f"{name} {100 * by:.2g}%" for name, by in found.differences.items() if by >= WORTH_SAYING]
        same = "every count is the same" + (f", but {', '.join(off)}" if off else "")
        lines.append(f"foretold from them and executed too: {_short(found.beyond)}: {same}")
    return lines


def _short(sizes: Sizes) -> str:
    return f"{sizes.experts}x{sizes.hidden}x{sizes.intermediate}"


def table(found: LayerCounts) -> Table:
    """A row for each kernel, in 80 columns."""
    out = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    out.add_column("kernel", no_wrap=True)
    for name in ("/mma", "int", "banks", "sectors", "MB in", "out", "bar", "µs"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("bound by", no_wrap=True)
    for label, counts in found.kernels.items():
        times = bounds(counts, found.plan.card)
        kinds, all_issued = counts.by_kind(), issued(counts)
        mma = kinds.get("tensor", 0)
        out.add_row(
            escape(label),
            f"{all_issued / mma:.1f}" if mma else "",
            f"{100 * kinds.get('integer', 0) / all_issued:.0f}%",
            _ratio(counts, "wavefronts"),
            _ratio(counts, "sectors"),
            _figure(counts.read / MB),
            _figure(counts.written / MB),
            f"{counts.barriers:.0f}",
            _figure(max(times.values()) / MICROSECOND),
            SHORT[bound_by(times)],
        )
    return out


def losses(found: LayerCounts) -> list[str]:
    """Where shared memory takes more passes and memory more sectors than it must: the line that loses most of each.

    Only of kernels that take a time.
    """
    out = []
    for label in notable(found):
        counts = found.kernels[label]
        for field, what in (("wavefronts", "shared memory"), ("sectors", "sectors")):
            ideal = counts.by_source(f"ideal_{field}")
            lost = {source: n - ideal.get(source, 0) for source, n in counts.by_source(field).items()}
            whole, most = sum(lost.values()), max(lost, key=lambda source: lost[source], default="")
            if whole > LOST * counts.total(field):
                share, times = 100 * lost[most] / whole, counts.total(field) / (counts.total(field) - whole)
                out.append(f"{label}: {what} {times:.2g} times the fewest; {share:.0f}% of it at {_place(most)}")
    return out


def notable(found: LayerCounts) -> list[str]:
    """The kernels whose least time is at least `SHOWN` of the longest one's."""
    times = {label: max(bounds(counts, found.plan.card).values()) for label, counts in found.kernels.items()}
    return [label for label, own in times.items() if own >= SHOWN * max(times.values())]


def _place(source: str) -> str:
    """File and line, outside of Triton's own library."""
    frames = source.replace("]", "").split(" @[ ")
    file, line, *_ = next((own for own in frames if not own.startswith("standard.py")), frames[0]).split(":")
    return f"{file}:{line}"


def _figure(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def _ratio(counts: KernelCounts, field: str) -> str:
    ideal = counts.total(f"ideal_{field}")
    return f"{counts.total(field) / ideal:.2f}" if ideal else ""


def notes() -> str:
    """What the columns mean."""
    return NOTES.format(target=TARGET)


def as_json(found: LayerCounts) -> dict[str, Any]:
    """All that is known."""
    plan = found.plan
    return {
        "schema": SCHEMA,
        "target": TARGET,
        **plan.shape.as_json(),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "packed": plan.packed,
        "backward": plan.backward,
        "tokens": plan.tokens,
        "counted_tokens": plan.counted_tokens,
        "active_experts": plan.active,
        "rows": plan.rows,
        "card": plan.card._asdict(),
        "slices": [own._asdict() for own in found.slices],
        "foretold": found.beyond and found.beyond._asdict(),
        "differences": found.differences,
        "kernels": {label: _kernel(counts, found) for label, counts in found.kernels.items()},
    }


def _kernel(counts: KernelCounts, found: LayerCounts) -> dict[str, Any]:
    times = bounds(counts, found.plan.card)
    return {
        "kernel": counts.kernel,
        "programs": counts.programs,
        "threads": counts.threads,
        "warp_instructions": counts.by_kind(),
        **{name: counts.total(name) for name in FIELDS},
        "l2_bytes": l2_bytes(counts),
        "read": counts.read,
        "written": counts.written,
        "barriers": counts.barriers,
        "seconds": times,
        "bound_by": bound_by(times),
        "instructions": [asdict(own) for own in counts.instructions if own.warps],
    }
