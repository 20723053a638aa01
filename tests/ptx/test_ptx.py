"""Compiled kernels, executed: in processes of their own, because this one may have interpreted kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in Path(__file__).parent.glob("compiled_*.py"))


SLOW = {"compiled_mutants.py"}


@pytest.mark.parametrize("file", [pytest.param(f, marks=[pytest.mark.nightly] if f in SLOW else []) for f in FILES])
def test_compiled(file: str, request: pytest.FixtureRequest) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    profile = request.config.getoption("--hypothesis-profile") or "dev"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-o", "markers=nightly: of tests that are imported", "--hypothesis-profile", profile]
    command += [str(Path(__file__).with_name(file))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]


def test_all_files_are_run() -> None:
    assert [name[9:-3] for name in FILES] == ["checks", "counts", "kernels", "language", "mutants", "spoiled"]
