"""The suite over processes, as a user runs it: every executor of a CPU on four ranks, interpreted Triton on two."""

import re
from pathlib import Path

import pytest

from plugin_runs import run_pytest

SUITE = "--pyargs", "moe_ref.conformance.parallel_suite", "-q"


def test_dense_and_four_bits_on_four_ranks(tmp_path: Path) -> None:
    named = [word for name in ("native", "grouped_nf4") for word in ("--executor", name)]
    ran = run_pytest(tmp_path, *SUITE, *named, "--ranks", "4", "--hypothesis-profile", "quick")
    assert ran.returncode == 0, ran.stdout
    assert "native: 13 clauses hold" in ran.stdout
    assert re.search(r"\b\d{2,} passed", ran.stdout)


def test_no_ranks_are_refused_in_one_line(tmp_path: Path) -> None:
    ran = run_pytest(tmp_path, *SUITE, "--executor", "native", "--ranks", "0")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert ran.stderr.strip() == "ERROR: --ranks 0: must be at least 1"


@pytest.mark.nightly
def test_grouped_mm_on_four_ranks(tmp_path: Path) -> None:
    ran = run_pytest(tmp_path, *SUITE, "--executor", "grouped_mm", "--ranks", "4", "--hypothesis-profile", "quick")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.nightly
def test_interpreted_triton_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = run_pytest(tmp_path, *SUITE, "--executor", "triton", "--ranks", "2", "--hypothesis-profile", "quick")
    assert ran.returncode == 0, ran.stdout
