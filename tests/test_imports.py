"""The house: who may import whom, read from the files themselves, and what an import drags in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from executors._registry import BUILT_IN

ROOT = Path(__file__).parents[1]
SPECIFICATION = {"numpy", "array_api_compat", "moe_ref"}
CONFORMANCE = SPECIFICATION | {"hypothesis", "pytest", "safetensors", "threadpoolctl", "torch", "executors"}
SHARED_WITH_EXECUTORS = ("moe_ref.types", "moe_ref.validation")
COMMAND_LINE = ("executors._cli", "executors.__main__")
EXECUTORS = [name for name in BUILT_IN if name != "auto"]


def violations(root: Path) -> list[str]:
    """One line for each import that the house forbids."""
    return [
        f"{path.relative_to(root)} imports {imported}, but {rule}"
        for path in files(root)
        for imported in imports(path.read_text(), package_of(path, root))
        if (rule := broken_rule(module_of(path, root), imported))
    ]


def files(root: Path) -> list[Path]:
    return sorted(path for package in ("moe_ref", "executors") for path in root.joinpath(package).rglob("*.py"))


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def package_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).parent.parts)


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names of all that is imported, at any depth: "a.b.c" for ``from a.b import c``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def broken_rule(importer: str, imported: str) -> str:
    """The rule that an import breaks, or ""."""
    if within(importer, "moe_ref.conformance"):
        return allowed_only(imported, CONFORMANCE, "moe_ref.conformance")
    if within(importer, "moe_ref"):
        if within(imported, "moe_ref.conformance"):
            return "the specification must not depend on its conformance suite"
        return allowed_only(imported, SPECIFICATION, "the specification")
    if within(importer, *COMMAND_LINE):
        return ""
    if within(imported, "moe_ref") and not within(imported, *SHARED_WITH_EXECUTORS):
        return f"executors share with the specification only {', '.join(SHARED_WITH_EXECUTORS)}"
    if (owner := executor_of(imported)) and owner != executor_of(importer):
        return f"only the executor {owner} itself imports its modules"
    return ""


def allowed_only(imported: str, allowed: set[str], who: str) -> str:
    if imported.partition(".")[0] in allowed | sys.stdlib_module_names:
        return ""
    return f"{who} imports only the standard library and {', '.join(sorted(allowed))}"


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def executor_of(module: str) -> str:
    """The executor whose module this is: "native" for executors.native, executors.native.x and executors._native_x."""
    for name in EXECUTORS:
        if within(module, f"executors.{name}") or module.startswith(f"executors._{name}_"):
            return name
    return ""


def test_the_house_stands() -> None:
    assert violations(ROOT) == []


def test_all_files_are_read() -> None:
    modules = {module_of(path, ROOT) for path in files(ROOT)}
    assert len(modules) >= 30
    assert {"moe_ref", "moe_ref.layer", "moe_ref.conformance.suite", "executors", "executors.native"} <= modules
    read = {name for path in files(ROOT) for name in imports(path.read_text(), package_of(path, ROOT))}
    assert {
        "array_api_compat.array_namespace",
        "executors._executor.OperatorExecutor",
        "moe_ref.types.MoEWeights",
    } <= read


UNDER_TYPE_CHECKING = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("moe_ref/planted.py", "import torch"),
        ("moe_ref/planted.py", "import torch.nn.functional as F"),
        ("moe_ref/planted.py", "import executors"),
        ("moe_ref/planted.py", "import hypothesis"),
        ("moe_ref/planted.py", "from moe_ref.conformance import problem"),
        ("moe_ref/planted.py", "from moe_ref import conformance"),
        ("moe_ref/planted.py", "from . import conformance"),
        ("moe_ref/planted.py", "from .conformance.gates import judge"),
        ("moe_ref/planted.py", "def late():\n    import torch"),
        ("moe_ref/planted.py", UNDER_TYPE_CHECKING + "import torch"),
        ("moe_ref/conformance/planted.py", "import scipy"),
        ("moe_ref/conformance/planted.py", "import triton"),
        ("executors/planted.py", "import moe_ref"),
        ("executors/planted.py", "from moe_ref import moe"),
        ("executors/planted.py", "from moe_ref.routing import route"),
        ("executors/planted.py", "from moe_ref import layer as types"),
        ("executors/planted.py", UNDER_TYPE_CHECKING + "from moe_ref.numerics import Rounding"),
        ("executors/planted/kernel.py", "from moe_ref.vjp import moe_vjp"),
        ("executors/planted.py", "from executors.native import Native"),
        ("executors/planted.py", "from executors import native"),
        ("executors/planted.py", "from executors import _native_op"),
        ("executors/planted.py", "from .native import Native"),
        ("executors/planted/kernel.py", "from ..native import Native"),
        ("executors/_auto.py", "import executors.native"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, file: str, line: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file} imports ")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("moe_ref/planted.py", "import math, numpy\nfrom array_api_compat import device\nfrom . import types"),
        ("moe_ref/conformance/planted.py", "import pytest, torch\nfrom . import gates\nfrom ..layer import moe"),
        ("executors/planted.py", "import torch\nfrom moe_ref import types\nfrom moe_ref.validation import check_x"),
        ("executors/planted.py", "from executors import _routing\nfrom executors._activation import forward"),
        ("executors/native.py", "from executors import _native_op"),
        ("executors/_cli/planted.py", "from moe_ref.conformance.gates import judge\nimport moe_ref, rich"),
    ],
)
def test_what_the_house_allows(tmp_path: Path, file: str, line: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("executors", "torch triton hypothesis pytest"),
        ("moe_ref", "torch triton hypothesis pytest executors"),
        ("moe_ref.conformance.plugin", "torch triton hypothesis executors"),
    ],
)
def test_import_drags_in_nothing_heavy(module: str, heavy: str) -> None:
    program = f"import {module}, sys; print(sorted(sys.modules.keys() & set({heavy.split()})))"
    command = [sys.executable, "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
