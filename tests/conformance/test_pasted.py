"""What stands before a failure's call: Python in the folder of the run then knows an executor of a conftest.py."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import executors
from executors import _registry
from moe_ref.conformance.reporting.judge import Judge
from moe_ref.conformance.reporting.ledger import failures_of
from moe_ref.conformance.reporting.pasted import before

SOURCE = "import executors\nfrom executors.native import Native\n\nexecutors.register('mine', Native)\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the run, which Python looks into, as it does where lines are pasted."""
    monkeypatch.setattr(_registry, "_registered", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    known = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - known:
        del sys.modules[name]


def collected(name: str, file: Path) -> None:
    """Runs a file as pytest runs a conftest.py, under a name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("module", "place", "statements"),
    [
        ("mine_conftest", "mine_conftest.py", "import mine_conftest; "),
        ("mine_tests.kernels", "mine_tests/kernels.py", "import mine_tests.kernels; "),
        ("mine_here", "mine_here/__init__.py", "import mine_here; "),
        ("mine_below", "below/mine_below.py", "import sys; sys.path.insert(0, 'below'); import mine_below; "),
        ("my-kernel.conftest", "my-kernel/conftest.py", "import runpy; runpy.run_path('my-kernel/conftest.py'); "),
    ],
)
def test_pasted_statements_register_the_executor(folder: Path, module: str, place: str, statements: str) -> None:
    collected(module, folder / place)
    assert before("mine") == statements
    executors.unregister("mine")
    exec(statements)
    assert executors.get("mine").name == "native"


def test_a_file_elsewhere_is_told_in_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected("mine_elsewhere", folder / "mine_elsewhere.py")
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")
    assert before("mine") == f"import sys; sys.path.insert(0, {str(folder)!r}); import mine_elsewhere; "


def test_nothing_stands_before_what_every_process_knows() -> None:
    assert before("native") == before("nobody") == ""
    exec("import executors; executors.register('pasted', lambda: None)", {"__name__": "__main__"})
    assert before("pasted") == ""


def test_a_failure_is_told_so(folder: Path) -> None:
    collected("mine_conftest", folder / "mine_conftest.py")

    def check_problem(_executor: Any, _problem: str, _device: str) -> None:
        raise LookupError("no kernel")

    with pytest.raises(LookupError) as caught:
        Judge("mine", executors.get("mine"), "cpu")(check_problem, "Problem")
    ((_, (failure,)),) = failures_of(caught.value)
    setup = "import mine_conftest; from moe_ref.conformance.reporting.again import *; "
    assert failure.again == f"again: {setup}check_problem(get('mine'), 'Problem')"
    assert failure.problem == "get('mine'), 'Problem')"
