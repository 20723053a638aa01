"""The executors' main tests once more, without instructions for 16-bit products, whatever this machine has.

Each test is a process of its own that takes the setting from its environment, and refuses to run without it.
"""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from without_16_bit import environment, pytest_configure, why_not

ROOT = Path(__file__).parents[2]
SUITE = "property_tests/test_conformance.py"
CHOSEN = {
    "exact": "exact_cases or every_code or refused",
    "random": "matches_specification or repeatable",
    "pinned": "pinned and not float32 and not float64",
}
PIECES = {
    "dense": ("tests/executors/test_dense.py", "tests/executors/test_grouped_mm.py"),
    "known bugs": ("tests/conformance/test_known_bugs.py", "tests/conformance/test_known_bugs_routing.py"),
    "compiled": ("tests/executors/test_numba.py", "tests/executors/test_numba_packed.py"),
    "4 bits decoded": ("tests/executors/test_decode.py", "property_tests/test_decode.py"),
    "4 bits in slices": ("tests/executors/test_grouped_nf4.py", "-k", "slices_hold"),
    "4 bits": ("tests/executors/test_grouped_nf4.py", "-k", "not slices_hold"),
    **{
        f"{name}: {what}": (SUITE, "--executor", name, "-k", chosen)
        for name in ("native", "grouped_mm", "grouped_nf4", "numba")
        for what, chosen in CHOSEN.items()
    },
}

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason=f"the setting is of x86; this is {platform.machine()}"
)


def python(*arguments: str) -> str:
    """What a process with the setting prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} exits with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_tests(*arguments: str) -> str:
    options = ("-q", "-p", "no:cacheprovider", "--hypothesis-profile=ci", f"--ignore={__file__}")
    return python("-m", "pytest", "-p", "without_16_bit", *options, *arguments)


def marked(piece: str) -> Any:
    """Drawn and pinned problems, all of the compiled products, and what else takes long, every night only."""
    slow = piece.endswith((": random", ": pinned"))
    slow |= piece in ("compiled", "4 bits", "4 bits in slices", "numba: exact", "grouped_nf4: exact")
    return pytest.param(piece, marks=[pytest.mark.nightly] if slow else [])


@pytest.mark.parametrize("piece", [marked(piece) for piece in PIECES])
def test_tests_pass(piece: str) -> None:
    assert re.search(r"^\d+ passed", run_tests(*PIECES[piece]), re.MULTILINE)


@pytest.mark.nightly
def test_compare_passes(tmp_path: Path) -> None:
    """The bundled layer, in bf16."""
    options = ("--tokens", "16", "--repeats", "1", "--out", str(tmp_path))
    printed = python("-m", "without_16_bit", "executors", "compare", *options)
    rows = {row["executor"]: row for row in json.loads((tmp_path / "compare.json").read_text())["executors"]}
    for name in ("native", "grouped_mm", "numba"):
        assert rows[name]["passed"], printed


@pytest.mark.parametrize(
    ("function", "answer", "reason"),
    [
        ("torch.backends.cpu.get_cpu_capability", "AVX512", "torch uses AVX512, not AVX2"),
        ("torch.ops.mkldnn._is_mkldnn_bf16_supported", True, "oneDNN has products in bf16"),
        ("torch.ops.mkldnn._is_mkldnn_fp16_supported", True, "oneDNN has products in fp16"),
    ],
)
def test_a_setting_that_is_not_taken_is_seen(
    function: str, answer: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would pass on the machine's own products."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    for dtype in ("bf16", "fp16"):
        monkeypatch.setattr(f"torch.ops.mkldnn._is_mkldnn_{dtype}_supported", lambda: False)
    assert why_not() == ""
    monkeypatch.setattr(function, lambda: answer)
    assert why_not() == reason
    with pytest.raises(pytest.UsageError, match=reason):
        pytest_configure()
