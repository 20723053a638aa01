"""Bugs planted in the text of the kernels, which the interpreter shows, show in the compiled kernels too."""

from __future__ import annotations

import importlib.util
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from executing import executing

PLACE = Path(__file__).parents[1] / "triton" / "test_triton_mutants.py"
NIGHTLY = settings.get_current_profile_name() == "nightly"
EVERY_RUN = 32  # every so many-th mutant


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
SLOW = {"routing", "grouping", "decoding"}  # checks that compile many kernels
MUTANTS = [*TESTS.ALL_MUTANTS]
if not NIGHTLY:
    MUTANTS = [name for name in MUTANTS if TESTS.ALL_MUTANTS[name][3] not in SLOW][::EVERY_RUN]


@pytest.mark.parametrize("name", dict.fromkeys(TESTS.ALL_MUTANTS[mutant][3] for mutant in MUTANTS))
def test_as_they_are(name: str) -> None:
    with executing():
        TESTS.check(name)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, problem = TESTS.ALL_MUTANTS[mutant]
    text = TESTS.source(file)
    planted = tmp_path / f"planted_{file}.py"
    planted.write_text(text.replace(right, wrong))
    modules = [TESTS.load(planted)]
    for importer in TESTS.IMPORTERS.get(file, ()):
        other = tmp_path / f"planted_{importer}.py"
        other.write_text(TESTS.source(importer).replace(f"executors._triton.kernels.{file}", f"planted_{file}"))
        modules.append(TESTS.load(other))
    for launcher, module in product(TESTS.LAUNCHERS, modules):
        for attribute in [a for a in vars(launcher) if a.endswith("_kernel") and hasattr(module, a)]:
            monkeypatch.setattr(launcher, attribute, getattr(module, attribute))
    with executing(), pytest.raises(AssertionError):
        TESTS.check(problem)
