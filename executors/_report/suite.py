"""Runs the conformance suite on an executor, in a process of its own, which may crash or hang."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

from executors._files.text import one_line
from executors._report.judged import SuiteRun
from moe_ref.conformance.reporting.results import BadResultsError, Results, read_results

SUITE = "moe_ref.conformance.suite"
DONE = re.compile(r"\[ *(\d+)%\]\s*$")  # at the end of a line of pytest
# Nobody's settings: those of the folder that we are in are for other tests.
PYTEST = (
    "--pyargs",
    SUITE,
    "-p",
    "no:cacheprovider",
    "-c",
    os.devnull,
    "--noconftest",
    "--import-mode=importlib",
    "--isolate",
)
PROFILES = ("quick", "dev", "ci", "nightly")
NEEDS = ("hypothesis", "pytest", "threadpoolctl")  # packages


@dataclass(frozen=True)
class SuiteSettings:
    """How executors are judged.

    Attributes:
        profile: of Hypothesis, such as "quick".
        device: where.
        expected: a file of expected failures.
        limit: seconds after which a run is ended.
        only: a pattern of tests, as of ``pytest -k``; "" is all.
    """

    profile: str = "quick"
    device: str = "cpu"
    expected: Path | None = None
    limit: float = 3600.0
    only: str = ""

    def arguments(self, name: str) -> list[str]:
        """Of pytest, beside `PYTEST`."""
        own = ["--executor", name, "--hypothesis-profile", self.profile]
        own += ["--executor-device", self.device] if self.device != "cpu" else []
        own += ["--expected-failures", str(self.expected)] if self.expected else []
        return own + (["-k", self.only] if self.only else [])


def run_suite(name: str, settings: SuiteSettings, progress: Callable[[int], None]) -> SuiteRun:
    """Judges an executor.

    Args:
        name: of the executor, which a new process must find: built in, or from an installed package.
        settings: how.
        progress: called with per cent of all tests.
    """
    again = shlex.join(["pytest", "--pyargs", SUITE, *settings.arguments(name)])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        options = [*PYTEST, "--rootdir", folder, "--results", str(path), "-v", "--color=no"]
        status, last = _pytest([*options, *settings.arguments(name)], settings.limit, progress)
        problem = "" if status in (0, 1) else _ended(status, settings.limit)
        try:
            found = read_results(path)
        except BadResultsError:
            found, problem = Results({}, settings.device, settings.profile), problem or "has written no results"
    if problem:
        problem = one_line(f"the suite {problem}{f': {last}' if last else ''}")
        return SuiteRun(None, found.device, found.profile, "", problem, again)
    return SuiteRun(found.executors[name], found.device, found.profile, found.left_out, "", again, found.version)


def _pytest(arguments: Sequence[str], limit: float, progress: Callable[[int], None]) -> tuple[int | None, str]:
    """The exit status, or None where it took too long; and the last line that it printed."""
    late: list[bool] = []
    lines: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:

        def end() -> None:
            late.append(True)
            _kill(process)

        timer = Timer(limit, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    lines.append(line.strip())
                if found := DONE.search(line):
                    progress(int(found[1]))
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                _kill(process)
    return (None if late else status), "".join(lines)


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a process with all that it started."""
    with suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def _ended(status: int | None, limit: float) -> str:
    if status is None:
        return f"took longer than {limit:g} s"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
