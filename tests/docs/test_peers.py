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
from typing import Any

import pytest

from executors import Executor, Unsupported
from moe_ref.conformance.judgement.call import call, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem
from moe_ref.conformance.judgement.errors import check_errors
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.reporting.ledger import Failure, Outcome
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


def test_a_clause_is_one_of_four(tmp_path: Path) -> None:
    judged = importlib.import_module("moe_ref_peers.judged")
    lines: list[dict[str, Any]] = [{"lacks": [["no gradients", ["D1"]]]}]
    broken = Failure(("E2", "the behaviour fork"), "y is off", "Problem()")
    for outcome in (
        Outcome("mine", "first", ("E1", "E2", "D1"), "passed"),
        Outcome("mine", "second", ("E2",), "failed", (broken,)),
        Outcome("mine", "third", ("E3", "E4"), "passed"),
        Outcome("mine", "fourth", ("E4",), "failed", (Failure(("raises ValueError",), "no"),)),
    ):
        lines += [{"begun": f"::{outcome.test}", "test": outcome.test, "clauses": []}, {"outcome": outcome.plain()}]
    lines.append({"begun": "::fifth", "test": "fifth", "clauses": ["C1"]})  # in which the process ended
    file = tmp_path / "told"
    file.write_text("\n".join(map(json.dumps, lines)))
    verdict = judged.Verdict("mine", {})
    assert judged._read(file, verdict, done=set()) == lines[-1]
    found = verdict.clauses()
    assert {own: found[own] for own in ("E1", "E2", "E3", "E4", "D1", "C1")} == {
        "E1": "holds",
        "E2": "fails",
        "E3": "holds",
        "E4": "not judged",
        "D1": "not promised",
        "C1": "not judged",
    }
    page = importlib.import_module("moe_ref_peers.page")
    assert page.others(verdict.plain()) == ["fork", "raises ValueError"]
    assert judged._read(file, verdict, done={"first", "second", "third", "fourth"}) == lines[-1]
    assert len(verdict.outcomes) == 4


def test_the_page_has_the_table_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "peers" / "peers.json").read_text(encoding="utf-8"))
    page = importlib.import_module("moe_ref_peers.page")
    assert page.table(results) in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert all(own["state"] == "reproduced" for own in results["findings"].values())
    assert page.versions(results) in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
