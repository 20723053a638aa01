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

    def apart_from(self, losses: list[float]) -> float:
        """The largest difference from another run's loss at the same step, in nats."""
        return max(abs(a - b) for a, b in zip(self.losses, losses, strict=True))


@dataclass(frozen=True)
class Results:
    """All runs.

    Attributes:
        contenders: the first is what the others are compared with.
        exact: losses of the run in fp32, or None.
        unit: what a token is called.
        adapter_comes_back: whether its files gave the same logits to the last bit.
        before, after: what the model wrote without the adapter, and with it.
    """

    contenders: list[Result]
    exact: list[float] | None
    unit: str
    adapter_comes_back: bool
    before: str
    after: str

    @property
    def ok(self) -> bool:
        """Whether the adapter came back, and every contender agrees."""
        return self.adapter_comes_back and all(self.agrees(own) for own in self.contenders)

    def agrees(self, own: Result) -> bool:
        """Whether a contender's losses are the first's, or nearer to the exact ones than those are."""
        first = self.contenders[0]
        if own.apart_from(first.losses) <= PARITY or self.exact is None:
            return own.apart_from(first.losses) <= PARITY
        return own.apart_from(self.exact) <= first.apart_from(self.exact)


def table(results: Results) -> Table:
    """A row for each contender; ratios to the first."""
    first = results.contenders[0]
    out = Table(pad_edge=False)
    out.add_column("experts", no_wrap=True)
    apart = [f"nats from {first.name}", "nats from fp32"]
    for heading in (f"{results.unit}s/s", "x", "peak MiB", "x", "last loss", *apart):
        out.add_column(heading, justify="right")
    for own in results.contenders:
        peak, smaller = "-", "-"
        if own.peak is not None:
            peak, smaller = f"{own.peak / MIB:.0f}", f"{own.peak / first.peak:.2f}" if first.peak else "-"
        out.add_row(
            own.name,
            f"{own.tokens_per_second:.0f}",
            f"{own.tokens_per_second / first.tokens_per_second:.2f}",
            peak,
            smaller,
            f"{own.losses[-1]:.4f}",
            "" if own is first else f"{own.apart_from(first.losses):.1e}",
            "-" if results.exact is None else f"{own.apart_from(results.exact):.1e}",
        )
    return out


def lines(results: Results) -> list[str]:
    """What came of it."""
    first = results.contenders[0]
    said = []
    for own in results.contenders[1:]:
        apart = own.apart_from(first.losses)
        word = f"within {PARITY}" if apart <= PARITY else f"more than {PARITY}"
        if apart > PARITY and results.exact is not None:
            nearer = results.agrees(own)
            word += f", and {'nearer to' if nearer else 'FARTHER from'} the run in fp32 than {first.name} is"
        said.append(f"{own.name}: losses are at most {apart:.1e} nats from those of {first.name}: {word}")
    same = "the same logits to the last bit" if results.adapter_comes_back else "OTHER LOGITS"
    said += [f"the adapter read back gives {same}"]
    said += [f"{own.name}: peak not measured: {own.reason}" for own in results.contenders if own.peak is None]
    return [*said, f"written before: {results.before!r}", f"written after:  {results.after!r}"]


def as_json(results: Results, arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured."""
    first = results.contenders[0]
    found = asdict(results)
    for row, own in zip(found["contenders"], results.contenders, strict=True):
        row["tokens_per_second"] = own.tokens_per_second
        row["apart_from_first"] = own.apart_from(first.losses)
        row["apart_from_exact"] = None if results.exact is None else own.apart_from(results.exact)
    versions = {name: version_of(name) for name in PACKAGES}
    return {"schema": SCHEMA, "machine": machine(), "versions": versions, "arguments": arguments, **found}
