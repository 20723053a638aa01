"""An interpreter, which may be that of another environment: what is installed there, and what it runs.

Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

PATIENCE = 60.0  # seconds for the list
LISTS = (
    "import json, importlib.metadata as m; print(json.dumps({own.metadata['Name']: own.version"
    " for own in m.distributions() if own.metadata['Name']}))"
)
LEADS_ELSEWHERE = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")  # what else could be imported


class UnusableError(Exception):
    """An interpreter that does not say what is installed."""


def run(python: str, arguments: Sequence[str], patience: float) -> subprocess.CompletedProcess[str]:
    """Runs an interpreter where nothing but its environment can be imported: in an empty folder, without PYTHONPATH.

    Raises:
        subprocess.TimeoutExpired: it was ended, with the processes that it had started.
    """
    kept = {name: value for name, value in os.environ.items() if name not in LEADS_ELSEWHERE}
    with (
        tempfile.TemporaryDirectory(prefix="findings-") as folder,
        subprocess.Popen(
            [python, *arguments],
            env=kept | {"PYTHONNOUSERSITE": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        try:
            out, err = process.communicate(timeout=patience)
        except BaseException:
            _end(process)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def installed(python: str) -> dict[str, str]:
    """The distributions of an environment and their versions, by names in lower case with hyphens.

    Raises:
        UnusableError: in one line, why they are not known.
    """
    try:
        ran = run(python, ["-c", LISTS], PATIENCE)
        found = json.loads(ran.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UnusableError(f"{python}: does not say what is installed: {type(error).__name__}") from error
    return {normal(name): version for name, version in sorted(found.items(), key=lambda item: normal(item[0]))}


def normal(name: str) -> str:
    """A distribution's name as comparisons need it."""
    return name.lower().replace("_", "-")


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it started."""
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
