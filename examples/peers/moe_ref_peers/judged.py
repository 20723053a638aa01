"""The suite on one peer, in a process of its own, and what it told, for a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from moe_ref.conformance.reporting.ledger import HOLDS, NOT_APPLICABLE
from moe_ref.conformance.reporting.results import ExecutorResults, FailureKind, read_results
from moe_ref_peers.peers import Entry

SUITE: tuple[str, ...] = ("-m", "pytest", "--pyargs", "moe_ref.conformance.suite", "-v", "-p", "no:cacheprovider")
SUITE += ("--noconftest", "-c", os.devnull)  # nothing that lies in a folder above
LIMIT = 300  # seconds for one problem
EVERY = 15.0  # seconds between lines of progress
TOLD = 400  # characters of a message
DONE = re.compile(r"^\S*::test_.* (PASSED|FAILED|SKIPPED)\b", re.MULTILINE)
STATES = {HOLDS: "holds", NOT_APPLICABLE: "not promised"}  # others are told as the suite tells them


@dataclass
class Verdict:
    """What came of the suite on one peer.

    Attributes:
        name: the executor.
        versions: of what it needs.
        told: what the suite told; None if the peer was not judged.
        tests: how many "passed", "failed" and "skipped".
        unavailable: why it was not judged, or "".
        seconds: that it took.
    """

    name: str
    versions: dict[str, str]
    told: ExecutorResults | None = None
    tests: dict[str, int] = field(default_factory=dict)
    unavailable: str = ""
    seconds: float = 0.0

    def clauses(self) -> dict[str, str]:
        """Each clause: "holds", "fails", "not promised" or "not judged"."""
        found = {} if self.told is None else self.told.clauses
        return {clause: STATES.get(own.state, own.state) for clause, own in found.items()}

    def failures(self) -> dict[str, dict[str, Any]]:
        """By what they break: how many, and the one on the smallest problem."""
        found: dict[str, list[FailureKind]] = {}
        for kind in () if self.told is None else self.told.failures:
            found.setdefault(", ".join(kind.breaks), []).append(kind)
        return {
            key: {
                "failures": sum(kind.count for kind in kinds),
                "says": kinds[0].says[:TOLD],
                "problem": kinds[0].problem[:TOLD],
            }
            for key, kinds in sorted(found.items())
        }

    def plain(self) -> dict[str, Any]:
        """For a file."""
        return {
            "versions": self.versions,
            "unavailable": self.unavailable,
            "seconds": round(self.seconds),
            "tests": self.tests,
            "clauses": self.clauses(),
            "failures": self.failures(),
            "not promised": [] if self.told is None else [lack.says for lack in self.told.lacks],
        }


def judge(entry: Entry, profile: str, tell: Callable[[str], None]) -> Verdict:
    """Runs the suite on a peer.

    A test that ends its process, or hangs, is a failed test.

    Args:
        entry: the peer.
        profile: of Hypothesis.
        tell: is given lines of progress.
    """
    verdict, began = Verdict(entry.name, entry.versions()), monotonic()
    if missing := entry.missing():
        verdict.unavailable = f"{missing} is not installed"
        return verdict
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        said = _run(entry, profile, file, tell)
        verdict.tests = counted(said)
        if file.exists():
            verdict.told = read_results(file).executors[entry.name]
        else:
            verdict.unavailable = next(iter(said.strip().splitlines()[-1:]), "the suite told nothing")
    verdict.seconds = monotonic() - began
    return verdict


def counted(said: str) -> dict[str, int]:
    """How many tests came to which end, by what pytest prints."""
    counts = Counter(DONE.findall(said))
    return {word.lower(): counts[word] for word in ("PASSED", "FAILED", "SKIPPED")}


def _run(entry: Entry, profile: str, file: Path, tell: Callable[[str], None]) -> str:
    """What the suite prints; its results are in a file, unless it cannot begin."""
    options = ["--executor", entry.name, f"--hypothesis-profile={profile}", "--results", str(file)]
    options += ["--isolate", "--isolate-limit", str(LIMIT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(entry.environment)
    log = file.with_name("printed")
    with log.open("w") as printed:
        command = [sys.executable, *SUITE, *options]
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT, cwd=file.parent)
        while process.poll() is None:
            try:
                process.wait(EVERY)
            except subprocess.TimeoutExpired:
                tell(f"{entry.name}: {sum(counted(log.read_text(errors='replace')).values())} tests")
    return log.read_text(errors="replace")
