"""The house: who may import whom, read from the files themselves, and what an import drags in."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPECIFICATION = {"numpy", "array_api_compat", "moe_ref"}
CONFORMANCE = SPECIFICATION | {"hypothesis", "pytest", "safetensors", "threadpoolctl", "torch", "executors"}
PTX = {"numpy", "torch", "triton", "moe_ref"}
SHARED_WITH_EXECUTORS = ("moe_ref.types", "moe_ref.validation")
FACE = {"executors", "_protocol", "_registry", "_checkpoint"}  # what a user of the package sees
BASE = {"_base", "_decode", "_protocol"}
PIPELINE = BASE | {"_pipeline"}
# Which rooms of executors a room may look into, beside itself.
ROOMS: dict[str, set[str]] = {
    "executors": {
        "_protocol",
        "_registry",
        "_saving",
        "_checkpoint",
        "_padding",
        "checkpoint",
        "hf",
        "mxfp4",
        "nf4",
        "nn",
        "parallel",
    },
    "_protocol": {"_declared"},
    "_registry": {"_protocol"},
    "_base": {"_after_import", "_protocol"},
    "_saving": {"_after_import"},
    "_pipeline": BASE,
    "_numba": PIPELINE,
    "_triton": BASE | {"_files"},
    "native": PIPELINE,
    "grouped_mm": PIPELINE,
    "grouped_nf4": PIPELINE,
    "numba": PIPELINE | {"_numba"},
    "triton": BASE | {"_triton"},
    "auto": {"_base", "_protocol", "_registry"},
    "nf4": {"_decode", "_files", "_progress"},
    "mxfp4": {"_decode", "_progress"},
    "nn": {"_protocol", "_registry", "nf4"},
    "parallel": {"_base", "_declared", "_files", "_protocol", "_registry", "nf4"},
    "hf": PIPELINE | {"_files", "_progress", "_registry", "checkpoint", "mxfp4", "nf4"},
    "checkpoint": {"_decode", "_files", "layer_file", "nf4", "mxfp4"},
    "layer_file": {"_files"},
    "_compare": FACE | {"_files", "layer_file"},
    "_bench": FACE | {"_files", "layer_file", "hf", "nf4", "mxfp4", "_decode", "_compare", "parallel"},
    "_tune": FACE | {"_base", "_triton", "_bench"},
    "_crossover": FACE | {"_triton", "_compare", "_bench", "_tune"},
    "_counts": FACE | {"_base", "_triton", "_compare", "_bench", "nf4", "mxfp4"},
    "_report": FACE | {"_files", "_compare", "_bench"},
    "_plan": {"_bench", "_compare", "_counts", "parallel"},
    "_cli": FACE
    | {"_decode", "_files", "checkpoint", "layer_file", "hf", "_triton", "_compare", "_bench", "_tune", "_crossover"}
    | {"_counts", "_plan", "_report"},
    "__main__": {"_cli"},
}
TOOLS = tuple(
    f"executors.{room}" for room in ("_compare", "_bench", "_tune", "_crossover", "_counts", "_plan", "_report", "_cli")
)  # of ours


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
    if within(importer, "moe_ref.conformance.ptx"):
        if within(imported, "moe_ref") and not within(imported, "moe_ref.conformance.ptx"):
            return "the executor of PTX knows no layers"
        return allowed_only(imported, PTX, "moe_ref.conformance.ptx")
    if within(importer, "moe_ref.conformance"):
        return allowed_only(imported, CONFORMANCE, "moe_ref.conformance")
    if within(importer, "moe_ref"):
        if within(imported, "moe_ref.conformance"):
            return "the specification must not depend on its conformance suite"
        if importer == "moe_ref.jax":
            return allowed_only(imported, SPECIFICATION | {"jax"}, importer)
        return allowed_only(imported, SPECIFICATION, "the specification")
    if within(imported, "moe_ref"):
        if within(importer, *TOOLS) or within(imported, *SHARED_WITH_EXECUTORS):
            return ""
        return f"executors share with the specification only {', '.join(SHARED_WITH_EXECUTORS)}"
    if within(imported, "executors"):
        own, other = room_of(importer), room_of(imported)
        if own != other and other not in ROOMS.get(own, set()):
            return f"{own} may look into {', '.join(sorted(ROOMS.get(own, set()))) or 'no other room'} only"
    if within(importer, "executors._triton.kernels") and within(imported, "executors"):
        return "" if within(imported, "executors._triton.kernels") else "kernels import kernels only"
    return ""


def room_of(module: str) -> str:
    """The file or folder of executors in which a module or one of its names is: "native", "_bench"; "executors"."""
    parts = module.split(".")
    known = {path.stem for path in ROOT.joinpath("executors").iterdir()} | {"planted"}
    return parts[1] if len(parts) > 1 and parts[1] in known else "executors"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, whichever way around."""
    reached = {module: reachable(graph, module) for module in graph}
    found = {tuple(sorted({m} | {o for o in reached[m] if m in reached.get(o, ())})) for m in graph if m in reached[m]}
    return sorted(map(list, found))


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph.get(module, ()))
    return seen


def graph_of(root: Path) -> dict[str, set[str]]:
    """Which modules each module imports, at any depth of its text; a name in a package counts as the package."""
    modules = {module_of(path, root): path for path in files(root)}

    def owner(name: str) -> str:
        return name if name in modules else name.rpartition(".")[0]

    return {
        module: {owner(n) for n in imports(path.read_text(), package_of(path, root)) if owner(n) in modules} - {module}
        for module, path in modules.items()
    }


def allowed_only(imported: str, allowed: set[str], who: str) -> str:
    if imported.partition(".")[0] in allowed | sys.stdlib_module_names:
        return ""
    return f"{who} imports only the standard library and {', '.join(sorted(allowed))}"


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_the_house_stands() -> None:
    assert violations(ROOT) == []


def test_nobody_imports_in_a_circle() -> None:
    assert circles(graph_of(ROOT)) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}, "f": {"d"}}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_every_room_has_its_rule() -> None:
    """A new room stands in the table, and the table has no rooms that are gone."""
    found = {room_of(module) for module in graph_of(ROOT) if within(module, "executors")}
    alone = {"_declared", "_progress", "_decode", "_checkpoint", "_padding", "_files", "_after_import"}
    assert found - alone == ROOMS.keys()


def test_the_page_has_the_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room, others in ROOMS.items():
        (said,) = re.findall(rf"^\| `{room}` \| .* \| (.*) \|$", text, flags=re.MULTILINE)
        assert re.findall("`([^`]+)`", said) == sorted(others), room


def test_all_files_are_read() -> None:
    modules = {module_of(path, ROOT) for path in files(ROOT)}
    assert len(modules) >= 30
    assert {"moe_ref", "moe_ref.layer", "moe_ref.conformance.suite", "executors", "executors.native"} <= modules
    read = {name for path in files(ROOT) for name in imports(path.read_text(), package_of(path, ROOT))}
    assert {
        "array_api_compat.array_namespace",
        "executors._base.executor.LayerExecutor",
        "moe_ref.types.MoEWeights",
    } <= read


UNDER_TYPE_CHECKING = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("moe_ref/planted.py", "import torch"),
        ("moe_ref/planted.py", "import jax.numpy as jnp"),
        ("moe_ref/jax.py", "import torch"),
        ("moe_ref/conformance/adapters.py", "import jax"),
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
        ("moe_ref/conformance/ptx/planted.py", "import executors"),
        ("moe_ref/conformance/ptx/planted.py", "from moe_ref.conformance.problems.problem import Problem"),
        ("moe_ref/conformance/ptx/planted.py", "import pytest"),
        ("executors/planted.py", "import moe_ref"),
        ("executors/planted.py", "from moe_ref import moe"),
        ("executors/planted.py", "from moe_ref.routing import route"),
        ("executors/planted.py", "from moe_ref import layer as types"),
        ("executors/planted.py", UNDER_TYPE_CHECKING + "from moe_ref.numerics import Rounding"),
        ("executors/planted/kernel.py", "from moe_ref.layer import moe_vjp"),
        ("executors/planted.py", "from executors.native import Native"),
        ("executors/planted.py", "from .native import Native"),
        ("executors/planted/kernel.py", "from ..native import Native"),
        ("executors/auto.py", "import executors.native"),
        ("executors/native.py", "from executors import grouped_mm"),
        ("executors/native.py", "from executors._cli import app"),
        ("executors/_base/planted.py", "from executors._pipeline import loop"),
        ("executors/_decode/planted.py", "from executors import nf4"),
        ("executors/_pipeline/planted.py", "from executors._triton.layer import forward"),
        ("executors/_pipeline/planted.py", "from executors._numba import kernels"),
        ("executors/_triton/planted.py", "from executors._pipeline.loop import LoopProducts"),
        ("executors/_triton/kernels/planted.py", "from executors._triton.launch import products"),
        ("executors/_bench/planted.py", "from executors._cli import app"),
        ("executors/_pipeline/planted.py", "from moe_ref.conformance.judgement.gates import judge"),
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
        ("moe_ref/jax.py", "import jax.numpy as jnp\nfrom moe_ref.types import MoEWeights"),
        ("moe_ref/conformance/planted.py", "import pytest, torch\nfrom . import gates\nfrom ..layer import moe"),
        ("moe_ref/conformance/ptx/planted.py", "import triton, torch\nfrom moe_ref.conformance.ptx.text import read"),
        ("executors/planted.py", "import torch\nfrom moe_ref import types\nfrom moe_ref.validation import check_x"),
        ("executors/_pipeline/planted.py", "from executors._base import routing\nfrom executors._decode import table"),
        ("executors/native.py", "from executors._pipeline import loop\nfrom ._base.operator import define"),
        ("executors/_triton/kernels/planted.py", "import triton\nfrom executors._triton.kernels import tiles"),
        ("executors/_cli/planted.py", "from moe_ref.conformance.judgement.gates import judge\nimport moe_ref, rich"),
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
        ("executors", "torch jax triton hypothesis pytest"),
        ("moe_ref", "torch jax triton hypothesis pytest executors"),
        ("moe_ref.conformance.plugin", "torch jax triton hypothesis executors"),
    ],
)
def test_import_drags_in_nothing_heavy(module: str, heavy: str) -> None:
    program = f"import {module}, sys; print(sorted(sys.modules.keys() & set({heavy.split()})))"
    command = [sys.executable, "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
