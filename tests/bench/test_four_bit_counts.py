"""The arithmetic behind the rule that says where 4 bits are decoded."""

import json
import sys
from pathlib import Path

import pytest

from executors._triton.decode_rule import COUNTED, RULES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STORED = json.loads((BENCHMARKS / "results" / "four-bit-counted" / "kernels.json").read_text())["families"]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import four_bit_counts

    yield four_bit_counts
    del sys.modules["four_bit_counts"]


def test_rules_that_were_counted_are_those_of_the_counts(counts) -> None:  # type: ignore[no-untyped-def]
    counted = {family for family, rule in RULES.items() if rule.basis == COUNTED}
    assert counted <= set(STORED)
    for family in counted:
        assert counts.counts_of(family, STORED[family]).crossover() == RULES[family].rows, family


def test_crossover_is_the_last_tile_that_costs_no_more(counts) -> None:  # type: ignore[no-untyped-def]
    """In tiles of 64: 2 (64 + 64) = 256 against 192 + 128, 384 against 384, 512 against 448."""
    own = counts.Counts(tiles=((16, 1.0), (64, 64.0)), row=1.0, write=192.0, read=0.5, read_codes=0.1)
    assert own.crossover() == 3 * 64
    assert own.fused(3, overlapped=False) == 1 + 16
    assert own.fused(65, overlapped=True) == 128
    assert own.decoded(1) == 192 + 16
    assert own._replace(tiles=((64, 900.0),)).crossover() == 0
    assert own._replace(read_codes=50.0).fused(1, overlapped=False) == 50
    assert own._replace(read=99.0).decoded(16) == 192 + 99
