"""The pytest plugin as a user meets it: pytest in its own process, from an empty directory."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import executors
from executors import _registry
from moe_ref.conformance import plugin
from plugin_runs import ONE_PERCENT, install, run_pytest

SUITE = "--pyargs", "moe_ref.conformance.suite"
SMALL = "-k", "pinned and not T2048 and not T4096 and not T3-"

FORWARD_ONLY = """
import executors
import torch
from executors.native import Native

class ForwardOnly:
    name = "forward_only"
    capabilities = executors.Capabilities(routing=False, backward=False)

    def check(self, x, weights):
        Native().check(x, weights)

    def __call__(self, x, router_logits, weights):
        raise AssertionError("was asked to route")

    def experts(self, x, *, topk_ids, topk_weights, weights):
        with torch.no_grad():
            return Native().experts(x, topk_ids=topk_ids, topk_weights=topk_weights, weights=weights)
"""

UNRELATED = """
import sys

def test_unrelated(request):
    assert request.config.pluginmanager.hasplugin("moe_ref")
    assert not {"hypothesis", "torch", "executors"} & sys.modules.keys()
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """An empty directory to run in."""
    directory = tmp_path / "outside"
    directory.mkdir()
    return directory


def test_unknown_executor_is_refused_at_the_start(outside: Path) -> None:
    ran = run_pytest(outside, *SUITE, "--collect-only", "--executor", "native", "--executor", "nativ")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert ran.stdout.strip() == ""
    (line,) = ran.stderr.strip().splitlines()
    names = ", ".join(map(repr, executors.names()))
    assert line == f"ERROR: --executor nativ: executor='nativ': must be one of {names} (did you mean 'native'?)"


def test_unavailable_executor_is_refused_at_the_start(outside: Path) -> None:
    install(outside, "broken", "broken:Broken", "raise RuntimeError('driver too old')")
    ran = run_pytest(outside, *SUITE, "--collect-only", "--executor", "broken")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = ran.stderr.strip().splitlines()
    assert re.match(r"ERROR: --executor broken: executor 'broken' .* RuntimeError: driver too old$", line)


def test_an_unknown_profile_is_refused_at_the_start(outside: Path) -> None:
    ran = run_pytest(outside, *SUITE, "--collect-only", "--hypothesis-profile", "fast")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = ran.stderr.strip().splitlines()
    names = "quick, dev, ci, nightly, or one that a conftest.py registers"
    assert line == f"ERROR: --hypothesis-profile fast: must be one of {names}"


@pytest.mark.parametrize(
    ("able", "message"),
    [
        ({"dtypes": "fp32"}, "its capabilities are of type dict, but must be executors.Capabilities"),
        (None, "its capabilities are of type NoneType, but must be executors.Capabilities"),
        (executors.Capabilities(devices=frozenset({"gpu"})), "its devices have 'gpu': must be types that torch has"),
    ],
)
def test_an_executor_that_declares_nothing_is_refused_in_one_line(
    able: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_registry, "_registered", {})
    executors.register("mine", lambda: SimpleNamespace(capabilities=able))  # type: ignore[arg-type, return-value]
    with pytest.raises(pytest.UsageError, match=f"^--executor mine: {message}$"):
        plugin._refuse_unusable(["mine"], "cpu")


def test_a_factory_that_cannot_be_called_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_registered", {})
    executors.register("mine", lambda size: size)
    with pytest.raises(
        pytest.UsageError, match=r"^--executor mine: .* missing 1 required positional argument: 'size'$"
    ):
        plugin._refuse_unusable(["mine"], "cpu")


def test_each_executor_that_is_named_is_judged(outside: Path) -> None:
    ran = run_pytest(outside, *SUITE, "--executor", "native", "--executor", "auto", "--collect-only", "-q")
    assert ran.returncode == 0
    tests = [line for line in ran.stdout.splitlines() if "::" in line]
    native, auto = ([line for line in tests if f"[{name}" in line or f"{name}]" in line] for name in ("native", "auto"))
    assert len(native) == len(auto) == len(tests) / 2 > 10


def test_without_a_name_the_usable_executors_are_judged(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default executors take CPU tensors; interpreted ones are slow and must be requested."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outside.joinpath("test_mine.py").write_text("from moe_ref.conformance.suite import *")
    ran = run_pytest(outside, "--collect-only", "-q", "-k", "bad_input")
    usable = ["grouped_mm", "grouped_nf4", "native", "numba"]
    assert re.findall(r"test_bad_input_is_refused_in_one_line\[(\w+)\]", ran.stdout) == usable
    said = "moe-ref judges grouped_mm, grouped_nf4, native, numba, each for minutes: --executor NAME judges one alone"
    assert said in ran.stdout.splitlines()


def test_interpreted_kernels_are_named_as_such(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = run_pytest(outside, *SUITE, "--executor", "triton", "-k", "exact_cases and clamp")
    assert ran.returncode == 0, ran.stdout
    assert "triton: its kernels were interpreted, not run on a device" in ran.stdout


def test_wrong_executor_fails_and_is_told_clause_and_problem(outside: Path) -> None:
    install(outside, "one_percent", "one_percent:one_percent", ONE_PERCENT)
    ran = run_pytest(outside, *SUITE, "--executor", "one_percent", "-x", *SMALL)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert re.search(r"^FAILED .*::test_pinned_problems\[", ran.stdout, re.MULTILINE)
    told = r"one_percent_more breaks C1, E1, E2: y.*, but must be .* limit.*"
    problem = r"Problem\(tokens=\d+, experts=\d+, .*config=MoEConfig\(top_k=.*\)"
    assert re.search(rf"{told}\nE +{problem}", ran.stdout)


def test_what_an_executor_does_not_offer_is_said_aloud(outside: Path) -> None:
    install(outside, "forward_only", "forward_only:ForwardOnly", FORWARD_ONLY)
    ran = run_pytest(outside, *SUITE, "--executor", "forward_only", *SMALL)
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout
    assert "forward_only: routing is done elsewhere; clauses R1-R5 and R9 are not applicable" in ran.stdout
    assert "forward_only: no backward pass; clauses D1-D5 are not applicable" in ran.stdout


def test_what_an_executor_offers_is_not_denied(outside: Path) -> None:
    ran = run_pytest(outside, *SUITE, "--executor", "native", "-k", "pinned and T0")
    assert ran.returncode == 0, ran.stdout
    counted, *said = [line for line in ran.stdout.splitlines() if line.startswith("native: ")]
    assert re.match(r"native: \d+ clauses hold, 6 not applicable, \d+ not judged here \(T1, ", counted)
    assert said == [
        "native: no weights in 4 bits; clauses Q1-Q3, Q5 and M1 are not applicable",
        "native: batch invariance is not declared; clause C2 is not applicable",
    ]


def test_other_test_runs_pay_nothing(outside: Path) -> None:
    outside.joinpath("test_unrelated.py").write_text(UNRELATED)
    ran = run_pytest(outside)
    assert ran.returncode == 0, ran.stdout


def test_a_file_of_one_line_is_enough(outside: Path) -> None:
    """Without --executor and without a profile, Hypothesis' own deadline must not apply."""
    outside.joinpath("test_mine.py").write_text("from moe_ref.conformance.suite import *\n")
    ran = run_pytest(outside, "-q", "-k", "repeatable and native")
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout


@pytest.mark.parametrize("profile", ["quick", "dev", "ci", "nightly"])
def test_profiles_can_be_asked_for_without_an_executor(outside: Path, profile: str) -> None:
    outside.joinpath("test_mine.py").write_text("from moe_ref.conformance.suite import *\n")
    ran = run_pytest(outside, "--collect-only", "-q", f"--hypothesis-profile={profile}")
    assert ran.returncode == 0, ran.stderr
