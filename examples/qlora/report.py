"""What came of a fine-tune: the table for people, the JSON for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from executors._compare.report import machine, version_of

SCHEMA = 1
MIB = 2**20
PARITY = 0.0022  # nats, in bf16: how far two right ways were apart when they were first compared
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Result:
    """Of one contender.

    Attributes:
        name: of a peer or an executor.
        losses: before each step.
        seconds: of each step.
        tokens: a step.
        peak: bytes that a step takes at most, above the model with its optimiser; None where it was not measured.
        reason: why not.
    """

    name: str
    losses: list[float]
    seconds: list[float]
    tokens: int
    peak: int | None
    reason: str = ""

    @property
    def tokens_per_second(self) -> float:
        """At the median step, without the first, which compiles and fills caches."""
        return self.tokens / median(self.seconds[1:] or self.seconds)

    def apart_from(self, other: Result) -> float:
        """The largest difference of the losses of one step, in nats."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))


def table(results: list[Result], unit: str) -> Table:
    """A row for each contender; ratios to the first."""
    first = results[0]
    out = Table(pad_edge=False)
    out.add_column("experts", no_wrap=True)
    for heading in (f"{unit}s/s", "x", "peak MiB", "x", "first loss", "last loss", f"apart from {first.name}"):
        out.add_column(heading, justify="right")
    for own in results:
        faster = own.tokens_per_second / first.tokens_per_second
        peak, smaller = "-", "-"
        if own.peak is not None:
            peak = f"{own.peak / MIB:.0f}"
            smaller = f"{own.peak / first.peak:.2f}" if first.peak else "-"
        apart = "" if own is first else f"{own.apart_from(first):.1e}"
        speed = f"{own.tokens_per_second:.0f}"
        out.add_row(
            own.name, speed, f"{faster:.2f}", peak, smaller, f"{own.losses[0]:.4f}", f"{own.losses[-1]:.4f}", apart
        )
    return out


def as_json(results: list[Result], arguments: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured."""
    first = results[0]
    rows = [
        asdict(own) | {"tokens_per_second": own.tokens_per_second, "apart_from_first": own.apart_from(first)}
        for own in results
    ]
    versions = {name: version_of(name) for name in PACKAGES}
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "versions": versions,
        "arguments": arguments,
        **said,
        "results": rows,
    }
