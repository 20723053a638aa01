"""Compiled kernels, executed: in processes of their own, because this one may have interpreted kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "async",
    "by_hand",
    "checks",
    "counts",
    "floats",
    "language",
    "layers",
    "sm90",
)  # files that share a process, because importing torch takes longer
ALONE = ("kernels", "kernels_sm90", "mutants", "spoiled", "spoiled_sm90")
SLOW = {"mutants", "spoiled_sm90"}
PROCESSES = [SMALL, *((name,) for name in ALONE)]


@pytest.mark.parametrize(
    "names", [pytest.param(p, marks=[pytest.mark.nightly] if {*p} & SLOW else [], id=" ".join(p)) for p in PROCESSES]
)
def test_compiled(names: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    profile = request.config.getoption("--hypothesis-profile") or "dev"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-o", "markers=nightly: of tests that are imported", "--hypothesis-profile", profile]
    command += [str(Path(__file__).with_name(f"compiled_{name}.py")) for name in names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]


def test_all_files_are_run() -> None:
    files = {path.stem.removeprefix("compiled_") for path in Path(__file__).parent.glob("compiled_*.py")}
    assert files == {*SMALL, *ALONE}
