"""Bugs planted in the text of the kernels, which the interpreter shows, show in the compiled kernels too."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
from hypothesis import settings

from executing import executing
from executors._triton import decode_rule
from moe_ref.conformance.ptx.launch import How

PLACE = Path(__file__).parents[1] / "triton" / "test_triton_mutants.py"
NIGHTLY = settings.get_current_profile_name() == "nightly"
EVERY_RUN = 32  # every so many-th mutant
DRAWN = How(seed=1)  # approximations that are right to the last bit hide what cancels


def interpreted_tests() -> ModuleType:
    """The tests that plant the same bugs under the interpreter, with their problems."""
    spec = importlib.util.spec_from_file_location("interpreted_mutants", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TESTS = interpreted_tests()
TESTS.PANEL["more rows"] = replace(TESTS.PANEL["interleaved"], experts=2)
PROBLEMS = {name: own[3] for name, own in TESTS.ALL_MUTANTS.items()}
PROBLEMS["rows of a tile beyond the first few"] = "more rows"  # one program of `dz` has all 16 rows of a tile for few
SLOW = {"routing", "grouping", "decoding"}  # checks that compile many kernels
MUTANTS = [*PROBLEMS] if NIGHTLY else [name for name in PROBLEMS if PROBLEMS[name] not in SLOW][::EVERY_RUN]


@contextmanager
def as_interpreted(problem: str) -> Iterator[None]:
    """Small problems take both ways of decoding 4 bits, as they do there; exact cases have exact approximations."""
    how = How() if problem == "exact" else DRAWN
    rules = decode_rule.RULES | {"sm80": decode_rule.RULES["interpreter"]}
    with executing(how), patch.object(decode_rule, "RULES", rules):
        yield


@pytest.mark.parametrize("name", dict.fromkeys(PROBLEMS[mutant] for mutant in MUTANTS))
def test_as_they_are(name: str) -> None:
    with as_interpreted(name):
        TESTS.check(name)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TESTS.plant(mutant, tmp_path, monkeypatch)
    with as_interpreted(PROBLEMS[mutant]), pytest.raises(AssertionError):
        TESTS.check(PROBLEMS[mutant])
