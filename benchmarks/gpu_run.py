"""Runs stages one after the other: each a process with a log, a time limit, and an outcome. Standard library only."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, LATE, SKIPPED = "passed", "failed", "timed out", "skipped"
SECONDS = "{seconds}"  # in a command: seconds that the stage's own work may take
RESERVE_S = 40.0  # between those and the moment at which the stage is ended
LEAST_S = 10.0  # left of the whole, below which no stage is begun
GRACE_S = 10.0  # between asking a stage to end and ending it


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Attributes:
        name: also of its log.
        command: program and arguments; `SECONDS` in it is replaced.
        cap: seconds after which it is ended.
        environment: added to this process's own.
        needs: programs that must be on the PATH.
        skip: why it is not run here, or "".
        folder: where it runs.
    """

    name: str
    command: tuple[str, ...]
    cap: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    skip: str = ""
    folder: Path = Path()


@dataclass(frozen=True)
class Outcome:
    """What came of a stage.

    Attributes:
        name: of the stage.
        status: `PASSED`, `FAILED`, `LATE` or `SKIPPED`.
        seconds: that it took.
        said: why it was skipped or ended, or the last line of its log.
        exit_status: of the process; None where there was none or it was ended.
        command: what was run.
    """

    name: str
    status: str
    seconds: float = 0.0
    said: str = ""
    exit_status: int | None = None
    command: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it ran and did not pass."""
        return self.status in (FAILED, LATE)

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        return asdict(self)


def run_all(stages: list[Stage], out: Path, limit: float, tell: Callable[[str], None]) -> Iterator[Outcome]:
    """Runs the stages in their order.

    Args:
        stages: what to run.
        out: folder for the logs, NAME.log.
        limit: seconds for all of them; a stage with too little time left is skipped, and says so.
        tell: called with a line before and after each stage.
    """
    started = time.monotonic()
    for stage in stages:
        left = limit - (time.monotonic() - started)
        missing = [program for program in stage.needs if shutil.which(program) is None]
        reason = stage.skip or (f"{missing[0]} is not on the PATH" if missing else "")
        if not reason and left < LEAST_S:
            reason = f"the limit of {limit:g} s was reached"
        if reason:
            outcome = Outcome(stage.name, SKIPPED, said=reason)
        else:
            tell(f"{stage.name} ...")
            outcome = run(stage, out / f"{stage.name}.log", min(stage.cap, left))
        tell(f"{stage.name}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.said}")
        yield outcome


def run(stage: Stage, log: Path, timeout: float) -> Outcome:
    """Runs one stage; ends it, and all that it started, after ``timeout`` seconds or if this process is interrupted."""
    own = f"{max(timeout - RESERVE_S, timeout / 2):.0f}"
    command = tuple(part.replace(SECONDS, own) for part in stage.command)
    started = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=stage.folder,
                env={**os.environ, **stage.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(stage.name, FAILED, said=f"{command[0]}: {error.strerror}", command=command)
        try:
            status: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    seconds = time.monotonic() - started
    if status is None:
        return Outcome(stage.name, LATE, seconds, f"ended after {timeout:.0f} s", None, command)
    return Outcome(stage.name, FAILED if status else PASSED, seconds, last_line(log), status, command)


def last_line(log: Path) -> str:
    """The last line that is not empty, without the marks around pytest's."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its children, politely first; nothing where it has ended."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
