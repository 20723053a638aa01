"""One command for a GPU host that may be offline: checks the executors there, then measures them.

python benchmarks/gpu.py [--wheels DIR] [--out FOLDER] [--stages NAME,NAME] [--limit SECONDS] [--short]

Each stage is a process of its own with a log in FOLDER; none stops the next. FOLDER gets summary.json, machine.json and
what the benchmark writes. ``--short`` runs the same stages on tiny layers without a GPU, the kernels in Triton's
interpreter. Exit status: 0, or 1 if a stage failed, 2 for bad arguments, 130 if it was interrupted.

Standard library only: it runs before anything is installed. docs/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from gpu_run import Outcome, run_all
from gpu_stages import NAMES, StagePlan, stages
from gpu_summary import failures, table, write_json

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 540.0
SCHEMA = 1


class OneLine(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages asked for; returns the exit status."""
    parser = OneLine(prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what this Python lacks")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bench-gpu", metavar="FOLDER")
    parser.add_argument("--stages", default="", metavar="NAMES", help=f"some of {','.join(NAMES)}; default: as it fits")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for all of it (%(default)g)")
    parser.add_argument("--profile", default="dev", help="Hypothesis profile of the suite: dev, ci or nightly")
    parser.add_argument("--commit", default="", metavar="TEXT", help="of this checkout, where git cannot tell")
    parser.add_argument("--short", action="store_true", help="tiny, on the CPU, kernels interpreted: it still works")
    given = parser.parse_args(arguments)
    wheels = _wheels(parser, given.wheels)
    chosen = tuple(dict.fromkeys(name for name in given.stages.split(",") if name))
    for name in chosen:
        if name not in NAMES:
            parser.error(f"--stages {name}: must be some of {','.join(NAMES)}")
    if not 0 < given.limit < math.inf:
        parser.error(f"--limit {given.limit:g}: must be more than 0 seconds, and finite")
    if given.profile not in ("dev", "ci", "nightly"):
        parser.error(f"--profile {given.profile}: must be dev, ci or nightly")
    out = given.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out}: must be a folder that can be written: {error.strerror}")
    site = Path(tempfile.mkdtemp(prefix="moe-ref-site-"))
    try:
        plan = StagePlan(sys.executable, ROOT, out, site, wheels, given.short, given.profile, chosen)
        return _run(plan, given.limit, given.commit or _commit())
    finally:
        shutil.rmtree(site, ignore_errors=True)


def _run(plan: StagePlan, limit: float, commit: str) -> int:
    started = time.monotonic()
    outcomes: list[Outcome] = []

    def keep(complete: bool) -> None:
        content = {
            "schema": SCHEMA,
            "commit": commit or None,
            "short": plan.short,
            "profile": plan.profile,
            "limit": limit,
            "seconds": time.monotonic() - started,
            "complete": complete,
            "stages": [outcome.as_json() | {"command": _portable(plan, outcome.command)} for outcome in outcomes],
        }
        write_json(plan.out / "summary.json", content)

    interrupted = False
    try:
        for outcome in run_all(stages(plan), plan.out, limit, lambda text: print(text, flush=True)):
            outcomes.append(outcome)
            keep(False)
    except KeyboardInterrupt:
        interrupted = True
    keep(not interrupted)
    print("\n".join(["", *failures(outcomes, plan.out), *table(outcomes), f"results: {plan.out}"]), flush=True)
    if interrupted:
        return 130
    return int(any(outcome.failed for outcome in outcomes))


def _portable(plan: StagePlan, command: tuple[str, ...]) -> str:
    """A command as one would type it in the checkout, without this machine's folders."""
    names = {f"{plan.root}{os.sep}": "", str(plan.out): "OUT", str(plan.site): "SITE", plan.python: "python"}
    text = " ".join(command)
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text


def _wheels(parser: OneLine, folder: Path | None) -> tuple[Path, ...]:
    if folder is None:
        return ()
    found = tuple(sorted(folder.glob("*.whl")))
    if not found:
        parser.error(f"--wheels {folder}: must be a folder with wheels (*.whl)")
    return found


def _commit() -> str:
    """The git commit, with "+" where files differ from it, or "" outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None:
        return ""
    head = git("rev-parse", "HEAD")
    return head + "+" if head and git("status", "--porcelain", "--untracked-files=no") else head


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: what there is is written
    sys.exit(main())
