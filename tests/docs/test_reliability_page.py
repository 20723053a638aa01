"""docs/reliability.md has the figures that were measured, of all writers and readers that there are."""

import json

import pytest

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import reliability
from fault_readers import READERS
from fault_writers import WRITERS

FOUND = json.loads(reliability.FIGURES.read_text())
TEXT = reliability.PAGE.read_text(encoding="utf-8")
WRITE = "run PYTHONPATH=examples python tests/support/reliability.py"


def test_the_page_has_the_figures() -> None:
    assert reliability.page(TEXT, FOUND) == TEXT, WRITE
    assert f"**{reliability.injections(FOUND):,} faults, 0 losses.**" in TEXT
    assert FOUND["losses"] == []


def test_nobody_is_missing() -> None:
    assert list(FOUND["writers"]) == [writer.name for writer in WRITERS], WRITE
    assert list(FOUND["readers"]) == [reader.name for reader in READERS], WRITE


def test_own_files_have_no_other_numbers() -> None:
    for reader in READERS:
        unseen = [counts[2] for fault, counts in FOUND["readers"][reader.name].items() if fault != "hostile"]
        assert not reader.own or sum(unseen) == 0, reader.name
