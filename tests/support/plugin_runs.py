"""pytest in a process of its own, with a plug-in that is installed beside it."""

import os
import subprocess
import sys
from pathlib import Path

ONE_PERCENT = """
import executors
from moe_ref.conformance.mutants import mutants

def one_percent():
    return mutants(executors.get("native"))["one_percent_more"]
"""


def run_pytest(outside: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a directory, with what `install` put beside it on the path."""
    path = [str(outside.parent / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=outside,
        env=environment | {"PYTHONPATH": os.pathsep.join(path), "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def install(outside: Path, name: str, target: str, source: str) -> None:
    """A distribution of one module with one entry point."""
    site = outside.parent / "site"
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    info.joinpath("entry_points.txt").write_text(f"[moe_ref.executors]\n{name} = {target}\n")
    site.joinpath(f"{target.partition(':')[0]}.py").write_text(source)
