"""Runs the findings: scripts that reproduce a defect with the peer alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from moe_ref_peers.peers import installed

PATIENCE = 300.0  # seconds
NEEDS = {  # the first word of a script's name, and what it needs
    "bitsandbytes": ("bitsandbytes",),
    "jax": ("jax",),
    "kt": ("kt-kernel",),
    "liger": ("liger-kernel", "transformers"),
    "peft": ("peft", "bitsandbytes"),
    "torch": ("torch",),
    "torchtitan": ("torchtitan",),
    "transformers": ("transformers",),
}


def missing(script: Path) -> str:
    """The first distribution that is not installed, or ""."""
    return next((name for name in NEEDS[script.stem.partition("_")[0]] if not installed(name)), "")


def reproduce(script: Path) -> tuple[str, list[str]]:
    """One of "reproduced", "gone", "not installed" or "does not run", and what the script printed."""
    if lacking := missing(script):
        return "not installed", [f"{lacking} is not installed"]
    try:
        ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "does not run", [f"not done after {PATIENCE:.0f} s"]
    lines = ran.stdout.splitlines()
    if not any(line.startswith("observed") for line in lines):
        return "does not run", ran.stderr.splitlines()[-1:]
    told = [line for line in lines if not _of_a_library(line)]
    return ("reproduced" if ran.returncode == 0 else "gone"), told


def reproduce_all(folder: Path, tell: Callable[[str], None]) -> dict[str, dict[str, object]]:
    """All scripts of a folder, by name."""
    found: dict[str, dict[str, object]] = {}
    for script in sorted(folder.glob("*.py")):
        state, lines = reproduce(script)
        tell(f"finding {script.stem}: {state}")
        found[script.stem] = {"state": state, "says": lines}
    return found


def _of_a_library(line: str) -> bool:
    """Whether kt-kernel printed a line when it began."""
    return line.startswith(("CPUInfer[", "WorkerPool[", "====", "In Numa", "TP MOE", "Created "))
