"""``python -m moe_ref_peers.alone``: each finding in an environment that has its package alone.

It makes an environment for each package, one after the other, in a temporary folder, and removes it. Standard library
only: whatever Python runs it, from a checkout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from moe_ref_peers.findings import REPRODUCED, reproduce_all
from moe_ref_peers.interpreter import UnusableError, installed, normal
from moe_ref_peers.machine import machine, tell
from moe_ref_peers.needs import NEEDS, InstallError, NotInIndexError, distributions, install, package_of

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "examples" / "peers" / "findings"
CONSTRAINTS = ROOT / "constraints.txt"
NAMED = {normal(name) for package in NEEDS for name in distributions(package)}


def main() -> None:
    """Runs it. It ends with 1 if a finding was not reproduced, or a package not installed that the index has."""
    parser = argparse.ArgumentParser(prog="moe_ref_peers.alone", description="findings with their package alone")
    parser.add_argument("--out", type=Path, default=Path("peers-results/findings.json"), help="file of the results")
    parser.add_argument(
        "--only", nargs="+", choices=NEEDS, default=list(NEEDS), metavar="PACKAGE", help=", ".join(NEEDS)
    )
    parser.add_argument("--keep", action="store_true", help="keep results in the file of packages that are not run")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the environment is removed
    try:
        found = before(asked.out) if asked.keep else {}
        for package in asked.only:
            found[package] = alone(package, tell)
            results = {
                "machine": machine(),
                "python": platform.python_version(),
                "date": datetime.date.today().isoformat(),
                "packages": {name: found[name] for name in NEEDS if name in found},
            }
            write_json(asked.out, results)  # what is there so far
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(table(results))
    if wrong := failures({package: found[package] for package in asked.only}):
        sys.exit("\n".join(wrong))


def before(file: Path) -> dict[str, Any]:
    """The packages of a run before.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file; one line names it.
    """
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["packages"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file}: must be what this program wrote; without --keep it is written anew") from None


def alone(package: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """A package's findings in an environment of its own.

    Args:
        package: a key of `NEEDS`.
        tell: is given lines of progress.

    Returns:
        Seconds that it took; why nothing was run ("unavailable"), and whether only because the index has no such
        package ("in_index"); all distributions of the environment; and each finding's state and output.
    """
    began = time.monotonic()
    own: dict[str, Any] = {"unavailable": "", "in_index": True, "distributions": {}, "findings": {}}
    tell(f"{package}: installing")
    with tempfile.TemporaryDirectory(prefix=f"findings-{package}-") as folder:
        try:
            python = fresh(Path(folder))
            install(python, package, CONSTRAINTS)
            own["distributions"] = installed(python)
            tell(f"{package}: {len(own['distributions'])} distributions")
            own["findings"] = reproduce_all(scripts_of(package), tell, python)
        except (NotInIndexError, InstallError, UnusableError) as error:
            own |= {"unavailable": str(error), "in_index": not isinstance(error, NotInIndexError)}
            tell(f"{package}: {error}")
    return own | {"seconds": round(time.monotonic() - began)}


def fresh(folder: Path) -> str:
    """Makes an empty environment, and gives its interpreter.

    Raises:
        InstallError: in one line, why it cannot be made.
    """
    ran = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    if ran.returncode != 0:
        said = (ran.stdout + ran.stderr).strip().splitlines()
        raise InstallError(f"no environment can be made: {said[-1] if said else f'exit code {ran.returncode}'}")
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def scripts_of(package: str) -> list[Path]:
    """A package's scripts."""
    return [script for script in sorted(SCRIPTS.glob("*.py")) if package_of(script) == package]


def failures(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each thing that is wrong. A package that the index lacks is not, unless nothing else was run."""
    if not any(own["findings"] for own in found.values()):
        return [f"{package}: {own['unavailable'] or 'has no findings'}" for package, own in found.items()]
    return [
        *(f"{name}: {own['unavailable']}" for name, own in found.items() if own["unavailable"] and own["in_index"]),
        *(
            f"{script}: {told['state']}: {' '.join(told['says'][-1:])}"
            for own in found.values()
            for script, told in own["findings"].items()
            if told["state"] != REPRODUCED
        ),
    ]


def table(results: dict[str, Any]) -> str:
    """A row for each package: the versions of what the findings are about, how many others, and what came of it."""
    lines = ["| package | in its environment | others | reproduced |", "|---|---|---|---|"]
    for package, own in results["packages"].items():
        present, findings = own["distributions"], own["findings"]
        first = [normal(name) for name in distributions(package)]
        names = sorted(
            NAMED & present.keys(), key=lambda name: (first.index(name) if name in first else len(first), name)
        )
        versions = ", ".join(f"{name} {present[name]}" for name in names)
        count = sum(told["state"] == REPRODUCED for told in findings.values())
        came = own["unavailable"] or f"{count} of {len(findings)}"
        lines.append(f"| `{package}` | {versions} | {len(present) - len(names)} | {came} |")
    return "\n".join(lines) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file, whole or not at all, as `executors` does, which needs more than the standard library.

    Raises:
        OSError: it cannot be written.
    """
    spec = spec_from_file_location("whole", ROOT / "executors" / "_files" / "whole.py")
    assert spec is not None
    assert spec.loader is not None
    whole = module_from_spec(spec)
    spec.loader.exec_module(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write_json(path, content)


if __name__ == "__main__":
    main()
