"""The pages that show code are executed."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parent.parent / "docs"
CLAUSES = [
    "T1",
    "T2",
    "R1",
    "R2",
    "R4",
    "R5",
    "R6",
    "R7",
    "R8",
    "G1",
    "E1",
    "E2",
    "E3",
    "E4",
    "E5",
    "C1",
    "D1",
    "D2",
    "D3",
]


@pytest.mark.parametrize("page", ["spec.md"])
def test_examples_on_the_page_hold(page: str) -> None:
    with np.printoptions():
        result = doctest.testfile(str(DOCS / page), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


def test_every_clause_is_on_the_page_once() -> None:
    text = (DOCS / "spec.md").read_text()
    assert re.findall(r"^\*\*([A-Z]\d)\.\*\*", text, flags=re.MULTILINE) == CLAUSES


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
