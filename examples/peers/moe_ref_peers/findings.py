"""Runs the findings: scripts that reproduce a defect with the peer alone. Standard library only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from moe_ref_peers.interpreter import installed, normal, run
from moe_ref_peers.needs import distributions, package_of

PATIENCE = 300.0  # seconds
REPRODUCED = "reproduced"


def missing(script: Path, present: Mapping[str, str]) -> str:
    """The first distribution that a script needs and that is not there, or ""."""
    return next((name for name in distributions(package_of(script)) if normal(name) not in present), "")


def reproduce(script: Path, python: str, present: Mapping[str, str]) -> tuple[str, list[str]]:
    """Runs a script.

    Args:
        script: of the folder of findings.
        python: the interpreter.
        present: the distributions of its environment.

    Returns:
        One of "reproduced", "gone", "not installed" or "does not run", and what the script printed.
    """
    if lacking := missing(script, present):
        return "not installed", [f"{lacking} is not installed"]
    try:
        ran = run(python, [str(script.resolve())], PATIENCE)
    except subprocess.TimeoutExpired:
        return "does not run", [f"not done after {PATIENCE:.0f} s"]
    told = [line for line in ran.stdout.splitlines() if not _of_a_library(line)]
    if not {"observed", "right"} <= {line.partition(" ")[0].rstrip(":,") for line in told}:
        return "does not run", ran.stderr.splitlines()[-1:] or [f"exit code {ran.returncode}"]
    return (REPRODUCED if ran.returncode == 0 else "gone"), told


def reproduce_all(
    scripts: Iterable[Path], tell: Callable[[str], None], python: str = sys.executable
) -> dict[str, dict[str, object]]:
    """Scripts, by name.

    Args:
        scripts: to run.
        tell: is given lines of progress.
        python: the interpreter.

    Raises:
        UnusableError: it does not say what is installed.
    """
    found: dict[str, dict[str, object]] = {}
    present = installed(python)
    for script in sorted(scripts):
        state, lines = reproduce(script, python, present)
        tell(f"finding {script.stem}: {state}")
        found[script.stem] = {"state": state, "says": lines}
    return found


def _of_a_library(line: str) -> bool:
    """Whether kt-kernel printed a line when it began."""
    return line.startswith(("CPUInfer[", "WorkerPool[", "====", "In Numa", "TP MOE", "Created "))
