"""The pages that show code are executed."""

import doctest
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clauses
import executors
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.mutants._registry import PACKED_MUTANTS

DOCS = Path(__file__).parents[2] / "docs"
CLAUSES = clauses.clauses()


@pytest.mark.parametrize(
    "page",
    [
        "spec.md",
        "nf4-weights.md",
        "mxfp4-weights.md",
        "four-bit.md",
        "checkpoints.md",
        "module.md",
        "padding.md",
        "reliability.md",
    ],
)
def test_examples_on_the_page_hold(page: str) -> None:
    with np.printoptions():
        result = doctest.testfile(str(DOCS / page), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


def test_every_clause_is_on_the_page_once() -> None:
    expected = (
        "T1 R1 R2 R3 R4 R5 R7 R8 R9 G1 E1 E3 E6 E8 C1 C3 D1 D2 D3 Q1 Q2 Q3 Q4 Q5 Q6 M1 T2 R6 E2 E4 E5 E7 C2 D4 D5"
    )
    assert " ".join(CLAUSES) == expected


def test_every_clause_has_an_example() -> None:
    parts = re.split(r"^(?=\*\*[A-Z]\d\.\*\* |## )", (DOCS / "spec.md").read_text(), flags=re.MULTILINE)
    assert [part[2:4] for part in parts if part.startswith("**") and ">>> " in part] == CLAUSES


def test_the_readmes_example_runs() -> None:
    """As it stands there, in a Python that has only imported what it imports."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), flags=re.DOTALL)
    given: dict[str, Any] = {}
    exec(code, given)
    assert (given["y"] - given["exact"]).abs().max() < 1e-6


def test_links_between_pages_lead_somewhere() -> None:
    for page in (DOCS.parent / "README.md", *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_teach_public_imports_only() -> None:
    """What begins with an underscore may change without a word."""
    for page in (DOCS.parent / "README.md", *DOCS.rglob("*.md")):
        taught = re.findall(r"^[ >.]*(?:from|import) ((?:executors|moe_ref)\S*)", page.read_text(), flags=re.MULTILINE)
        assert not [name for name in taught if "._" in name], page.name


def test_the_table_of_clauses_is_up_to_date() -> None:
    assert clauses.PAGE.read_text() == clauses.page(), "run python tests/support/clauses.py"


def test_every_clause_is_held_on_every_executor() -> None:
    """But those on quantising and on calls of a library: no executor does either."""
    ways = clauses.held_by()
    on_every = {c for c in CLAUSES if ways[c].names("suite") or ways[c].names("native and grouped_mm")}
    assert [clause for clause in CLAUSES if clause not in on_every] == ["Q4", "Q6"]


def test_every_clause_has_its_way() -> None:
    """A function of the specification, unless it is about implementations; code but for dtypes and refusals; tests."""
    ways = clauses.held_by()
    without = [clause for clause in CLAUSES if "specification" not in ways[clause].found]
    assert without == list(clauses.OF_IMPLEMENTATIONS)
    assert [clause for clause in CLAUSES if "kernels and executors" not in ways[clause].found] == ["R8", "T2"]
    assert all({"suite", "native and grouped_mm", "tests"} & ways[clause].found.keys() for clause in CLAUSES)


def test_clauses_that_a_mutant_can_break_have_one() -> None:
    """The others are about errors, sizes of gigabytes, comparisons of an executor with itself, and what none does."""
    ways = clauses.held_by()
    elsewhere = {"T1", "R8", "E5", "C2", "D4", "D5", "Q4", "Q6"}
    assert [clause for clause in CLAUSES if not ways[clause].names("mutants") and clause not in elsewhere] == []


def test_the_readme_counts_the_mutants() -> None:
    text = (DOCS.parent / "README.md").read_text()
    (said,) = re.findall(r"(\d+) deliberately wrong executors", text)
    assert int(said) == len(mutants(executors.get("native")))
    (in_4_bits,) = re.findall(r"(\d+) more\s+that misread 4-bit weights", text)
    assert int(in_4_bits) == len(PACKED_MUTANTS)
