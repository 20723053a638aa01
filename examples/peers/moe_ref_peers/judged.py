"""The suite on one peer, in processes of its own: a test that ends its process is noted, and the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_ref.conformance.reporting.ledger import HOLDS, NOT_APPLICABLE, NOT_JUDGED, Failure, Ledger, Outcome
from moe_ref_peers.peers import Entry

SUITE: tuple[str, ...] = ("-m", "pytest", "--pyargs", "moe_ref.conformance.suite", "-q", "-p", "no:cacheprovider")
SUITE += ("--noconftest", "-c", os.devnull)  # nothing that lies in a folder above
PATIENCE = 600.0  # seconds for one test
DEATHS = 30  # after which the rest is not judged
TOLD = 400  # characters of a message
EVERY = 15.0  # seconds between lines of progress


@dataclass
class Verdict:
    """What came of the suite on one peer.

    Attributes:
        name: the executor.
        versions: of what it needs.
        lacks: what it does not promise, each with the clauses that do not apply because of it.
        outcomes: of all tests.
        unavailable: why nothing was judged, or "".
        seconds: that it took.
    """

    name: str
    versions: dict[str, str]
    lacks: list[tuple[str, list[str]]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    unavailable: str = ""
    seconds: float = 0.0

    def clauses(self) -> dict[str, str]:
        """Each clause: "holds", "fails", "not promised" or "not judged".

        Not judged is also what a test is about that raised another error, or ended its process.
        """
        left_out = {clause for _, clauses in self.lacks for clause in clauses}
        found = Ledger((), self.outcomes).states(self.name, left_out)
        hidden = {
            clause
            for own in self.outcomes
            if any(failure.breaks[0].startswith(("raises ", "ends ")) for failure in own.failures)
            for clause in own.clauses
        }
        hides = {HOLDS: NOT_JUDGED, NOT_APPLICABLE: "not promised"}
        return {
            clause: hides.get(state, state) if state != HOLDS or clause in hidden else state
            for clause, state in found.items()
        }

    def failures(self) -> dict[str, dict[str, Any]]:
        """By what they break: how many, and the one on the smallest problem."""
        found: dict[str, list[Failure]] = {}
        for outcome in self.outcomes:
            for failure in outcome.failures:
                found.setdefault(", ".join(failure.breaks), []).append(failure)
        smallest = {key: min(own, key=lambda failure: len(failure.problem)) for key, own in sorted(found.items())}
        return {
            key: {"failures": len(found[key]), "says": own.says[:TOLD], "problem": own.problem[:TOLD]}
            for key, own in smallest.items()
        }

    def plain(self) -> dict[str, Any]:
        """For a file."""
        counts = {kind: sum(own.outcome == kind for own in self.outcomes) for kind in ("passed", "failed", "skipped")}
        return {
            "versions": self.versions,
            "unavailable": self.unavailable,
            "seconds": round(self.seconds),
            "tests": counts,
            "clauses": {} if self.unavailable else self.clauses(),
            "failures": self.failures(),
            "not promised": [says for says, _ in self.lacks],
        }


def judge(entry: Entry, profile: str, tell: Callable[[str], None]) -> Verdict:
    """Runs the suite on a peer.

    Args:
        entry: the peer.
        profile: of Hypothesis.
        tell: is given lines of progress.
    """
    verdict, began = Verdict(entry.name, entry.versions()), time.monotonic()
    if missing := entry.missing():
        verdict.unavailable = f"{missing} is not installed"
        return verdict
    dead: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(DEATHS):
            file = Path(folder) / f"{number}.jsonl"
            code, said = _process(entry, profile, dead, file, tell)
            begun = _read(file, verdict, done={own.test for own in verdict.outcomes})
            if begun is None:
                verdict.unavailable = "" if verdict.outcomes else said
                break
            how = "it takes too long" if code is None else _ending(code)
            tell(f"{entry.name}: {begun['test']}: {how}")
            dead.append(begun["begun"])
            failure = Failure(("ends the process",), f"{begun['test']}: {how}")
            verdict.outcomes.append(Outcome(entry.name, begun["test"], tuple(begun["clauses"]), "failed", (failure,)))
    verdict.seconds = time.monotonic() - began
    return verdict


def _process(
    entry: Entry, profile: str, dead: list[str], file: Path, tell: Callable[[str], None]
) -> tuple[int | None, str]:
    """The exit code, or None if it was ended, and the last line that it printed."""
    file.touch()
    options = ["--executor", entry.name, f"--hypothesis-profile={profile}", "-p", "moe_ref_peers.collect"]
    command = [sys.executable, *SUITE, *options, "--outcomes", str(file), *(f"--deselect={own}" for own in dead)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(entry.environment)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=file.parent)
        while process.poll() is None:
            try:
                process.wait(EVERY)
            except subprocess.TimeoutExpired:
                tell(f"{entry.name}: {len(file.read_bytes().splitlines()) // 2} tests")
            if process.poll() is None and time.time() - file.stat().st_mtime > PATIENCE:
                process.kill()
                process.wait()
                return None, ""
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.strip()]
    return process.returncode, said[-1] if said else f"exit code {process.returncode}"


def _read(file: Path, verdict: Verdict, done: set[str]) -> dict[str, Any] | None:
    """Adds what a process told to a verdict; gives the test that it died in, if it did."""
    begun = None
    for line in file.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        if "lacks" in told:
            verdict.lacks = [(says, clauses) for says, clauses in told["lacks"]]
        elif "begun" in told:
            begun = told
        else:
            begun = None
            if told["outcome"] is not None and (outcome := Outcome.of(told["outcome"])).test not in done:
                verdict.outcomes.append(outcome)
    return begun


def _ending(code: int) -> str:
    return f"ends in {signal.Signals(-code).name}" if code < 0 else f"ends with exit code {code}"
