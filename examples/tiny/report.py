"""The table for people, and the JSON for programs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from executors._compare.report import machine
from tiny import checkpoint, text
from tiny.judgement import LIMIT, Verdict, otherwise
from tiny.training import Run

SCHEMA = 1


@dataclass(frozen=True)
class Contender:
    """An executor, or a deliberately wrong one.

    Attributes:
        name: the executor's.
        run: held to the exact run's choices.
        verdict: on that run.
        free: the run that chooses for itself, as training does; None for what is wrong on purpose.
        wrong: whether it is wrong on purpose.
        interpreted: whether an interpreter ran its kernels.
    """

    name: str
    run: Run
    verdict: Verdict
    free: Run | None = None
    wrong: bool = False
    interpreted: bool = False


@dataclass(frozen=True)
class Results:
    """All runs: the exact one, honest ones with their deviations from it, and the contenders."""

    exact: Run
    honest: list[Run]
    sd: list[float]
    contenders: list[Contender]

    @property
    def failed(self) -> bool:
        """Whether the losses of an executor disagree."""
        return any(not contender.verdict.agrees for contender in self.contenders if not contender.wrong)


def table(results: Results) -> Table:
    """A row for each step, in 80 columns where there are up to five contenders."""
    out = Table(title="differences from the exact losses, in nats per byte", pad_edge=False)
    for heading in ("step", "exact", "allowed"):
        out.add_column(heading, justify="right", no_wrap=True)
    for contender in results.contenders:
        out.add_column(contender.name, justify="right", overflow="fold")
    for step, (loss, sd) in enumerate(zip(results.exact.losses, results.sd, strict=True)):
        found = (_difference(contender.verdict, step) for contender in results.contenders)
        out.add_row(str(step + 1), f"{loss:.4f}", f"{LIMIT * sd:.1e}", *found)
    return out


def lines(results: Results) -> list[str]:
    """What came of each contender."""
    found = []
    for contender in results.contenders:
        verdict, (differing, choices) = contender.verdict, contender.verdict.otherwise
        word = "agrees" if verdict.agrees else "DISAGREES"
        if contender.wrong:
            word = f"wrong on purpose, {'NOT seen' if verdict.agrees else 'seen'}"
        found.append(
            f"{contender.name}: {word}; farthest at step {verdict.worst + 1}, {abs(verdict.z[verdict.worst]):.2g} "
            f"deviations (allowed: {LIMIT:g}); would have chosen otherwise {differing} of {choices:,} times"
        )
        if contender.free is not None:
            differing, _ = otherwise(contender.free, results.exact)
            first = _first_of_its_own(contender.free, results.exact)
            found.append(
                f"  free to choose: last loss {contender.free.losses[-1]:.4f} (exact: {results.exact.losses[-1]:.4f}); "
                + (f"{differing} choices differ, the first at step {first}" if differing else "the same choices")
            )
    return found


def as_json(results: Results, arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "arguments": arguments,
        "model": {path.name: _sha256(path.read_bytes()) for path in (checkpoint.LAYER, checkpoint.REST)},
        "text": {"source": "pydoc_data.topics", "sha256": text.sha256()},
        "loss_unit": "nats per byte",
        "limit": LIMIT,
        "exact": results.exact.losses,
        "honest": [run.losses for run in results.honest],
        "honest_otherwise": [otherwise(run, results.exact)[0] for run in results.honest],
        "deviations": results.sd,
        "contenders": [_as_json(contender, results.exact) for contender in results.contenders],
    }


def _as_json(contender: Contender, exact: Run) -> dict[str, Any]:
    verdict = contender.verdict
    found: dict[str, Any] = {
        "name": contender.name,
        "wrong_on_purpose": contender.wrong,
        "interpreted": contender.interpreted,
        "agrees": verdict.agrees,
        "losses": contender.run.losses,
        "z": verdict.z,
        "otherwise": verdict.otherwise[0],
        "choices": verdict.otherwise[1],
    }
    if contender.free is not None:
        found["free"] = {"losses": contender.free.losses, "otherwise": otherwise(contender.free, exact)[0]}
    return found


def _difference(verdict: Verdict, step: int) -> str:
    text = f"{verdict.differences[step]:+.1e}"
    return text if abs(verdict.z[step]) <= LIMIT else f"[red]{text}[/red]"


def _first_of_its_own(run: Run, exact: Run) -> int:
    """The step (from 1) at which a run first chooses other experts than the exact one; 0 if it never does."""
    calls = len(exact.choices) // len(exact.losses)
    pairs = enumerate(zip(run.choices, exact.choices, strict=True))
    return next((call // calls + 1 for call, (own, other) in pairs if bool((own != other).any())), 0)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
