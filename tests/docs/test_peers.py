"""The adapters of public implementations: they compute the layer, refuse what is not promised, and are told rightly."""

import importlib
import json
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from executors import Executor, Unsupported
from moe_ref.conformance.judgement.call import call, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem
from moe_ref.conformance.judgement.errors import check_errors
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.reporting.results import ExecutorResults, FailureKind
from moe_ref.types import MoEConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "peers"
POINTS = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]["moe_ref.executors"]
SWIGLU = Problem(9, 4, 32, 64, MoEConfig(2), entry="experts", empty_slots=True)
OSS = MoEConfig(2, alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
PROBLEMS = {
    "qwen3": SWIGLU,
    "gpt_oss": replace(SWIGLU, config=OSS, gate_up_bias=True, down_bias=True),
    "nemotron_h": replace(SWIGLU, config=MoEConfig(2, activation="relu2")),
}
REFUSES_SLOTS = ("transformers_gpt_oss_eager", "transformers_nemotron_h_eager")  # docs/findings.md, 5
HERE = [name for name in POINTS if name.startswith(("transformers_", "bitsandbytes", "jax_"))]


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """As if it were; libraries may warn when they are imported."""
    sys.path.insert(0, str(PACKAGE))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(PACKAGE))


def peer(name: str) -> Executor:
    """As the entry point gives it."""
    executor: Executor = EntryPoint(name, POINTS[name], "moe_ref.executors").load()()
    assert executor.name == name
    return executor


def problem_of(name: str) -> Problem:
    """One that the peer takes, and computes rightly."""
    if name == "bitsandbytes":
        return replace(SWIGLU, hidden=64, quant_type="nf4", blocksize=64, nested="one")
    own = next((own for family, own in PROBLEMS.items() if family in name), SWIGLU)
    return replace(own, empty_slots=name not in REFUSES_SLOTS)


@pytest.mark.parametrize("name", HERE)
def test_an_adapter_computes_the_layer(name: str) -> None:
    check_problem(peer(name), problem_of(name))


def test_an_adapter_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = peer("transformers_qwen3_grouped_mm")
    module = importlib.import_module("moe_ref_peers.transformers_experts")
    monkeypatch.setitem(module.GATED, "swiglu", "gelu")
    with pytest.raises(ConformanceError, match="breaks"):
        check_problem(executor, SWIGLU)


@pytest.mark.parametrize("name", HERE)
def test_what_is_not_promised_is_refused(name: str) -> None:
    problem = replace(problem_of(name), config=MoEConfig(2, limit=1.5, alpha=2.0))
    inputs = to_torch(problem, build(problem), "cpu")
    with pytest.raises(Unsupported, match=rf"must be .* for {name}$"):
        call(peer(name), inputs)


def test_bad_input_is_refused_whatever_constants_are_declared() -> None:
    """gpt-oss' alone: each bad input must be bad in one way, not in two."""
    check_errors(peer("transformers_gpt_oss_grouped_mm"))


def test_the_driver_knows_every_adapter() -> None:
    entries = importlib.import_module("moe_ref_peers.peers").PEERS
    assert sorted(own.name for own in entries) == sorted(POINTS)


def test_what_the_suite_told_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    judged, peers = (importlib.import_module(f"moe_ref_peers.{name}") for name in ("judged", "peers"))
    monkeypatch.setattr(judged, "SUITE", (*judged.SUITE, "-k", "bad_input or test_batch_invariance"))
    monkeypatch.setattr(judged, "EVERY", 0.5)
    lines: list[str] = []
    found = judged.judge(peers.Entry("native", ("torch",)), "quick", lines.append).plain()
    assert (found["unavailable"], found["tests"]) == ("", {"passed": 1, "failed": 0, "skipped": 1})
    assert {own: found["clauses"][own] for own in ("T1", "C2", "E2", "E7")} == {
        "T1": "holds",
        "C2": "not promised",
        "E2": "not judged",
        "E7": "not judged",
    }
    assert "native: 0 tests" in lines
    assert "native: batch invariance" not in found["not promised"]


def test_who_cannot_be_judged_says_why() -> None:
    judged, peers = (importlib.import_module(f"moe_ref_peers.{name}") for name in ("judged", "peers"))
    lacking = judged.judge(peers.Entry("native", ("no-such-thing",)), "quick", print)
    assert lacking.unavailable == "no-such-thing is not installed"
    unknown = judged.judge(peers.Entry("nobody", ("torch",)), "quick", print).plain()
    assert "nobody" in unknown["unavailable"]
    assert (unknown["clauses"], unknown["failures"]) == ({}, {})


def test_failures_are_told_by_what_they_break() -> None:
    judged, page = (importlib.import_module(f"moe_ref_peers.{name}") for name in ("judged", "page"))
    kinds = [
        FailureKind(("E2", "the behaviour fork"), 2, "y is off", "Problem()", cause="wrong values"),
        FailureKind(("E2", "the behaviour fork"), 3, "y is NaN", cause="NaN"),
        FailureKind(("raises ValueError",), 1, "no"),
    ]
    verdict = judged.Verdict("mine", {}, ExecutorResults({}, tuple(kinds))).plain()
    assert verdict["failures"]["E2, the behaviour fork"] == {"failures": 5, "says": "y is off", "problem": "Problem()"}
    assert page.others(verdict) == ["fork", "raises ValueError"]


def test_the_page_has_the_table_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "peers" / "peers.json").read_text(encoding="utf-8"))
    page = importlib.import_module("moe_ref_peers.page")
    assert page.table(results) in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert all(own["state"] == "reproduced" for own in results["findings"].values())
    assert page.versions(results) in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
