"""Which tests hold which clause: the source of docs/clauses.md, which ``python tests/support/clauses.py`` rewrites.

A test holds the clauses that its docstring or its name names. Tests that run on every executor are those of the suite,
and those that take an executor's name.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "clauses.md"
CLAUSE = re.compile(r"\b([TRGECDQM]\d)\b")
HEAD = """# Clauses and the tests that hold them

Made by `python tests/support/clauses.py` from the docstrings of the tests. The suite runs on whatever executor it is
given; the tests beside it that are named in the second column run on `native` and on `grouped_mm`. A mutant is a
deliberately wrong executor that breaks the clause: the suite must reject it.

| clause | on every executor | of the specification and the project | mutants |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    every, own, mutants = held_by()
    lines = [
        f"| {clause} | {cells(every[clause])} | {cells(own[clause])} | {cells(mutants[clause])} |"
        for clause in clauses()
    ]
    return HEAD + "\n".join(lines) + "\n"


def clauses() -> list[str]:
    """The clauses of docs/spec.md, in its order."""
    return re.findall(r"^\*\*([A-Z]\d)\.\*\*", (ROOT / "docs" / "spec.md").read_text(), flags=re.MULTILINE)


def held_by() -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """By clause: tests on every executor, other tests, and mutants."""
    every, own, mutants = (defaultdict(list) for _ in range(3))
    for path in (ROOT / "moe_ref" / "conformance" / "suite.py", *files("tests"), *files("property_tests")):
        for function in functions(path):
            if function.name.startswith("test_"):
                on_every = path.name == "suite.py" or takes_executor(function)
                for clause in named(function):
                    (every if on_every else own)[clause].append(f"{path.stem}: {function.name.removeprefix('test_')}")
    for path in files("moe_ref/conformance/mutants"):
        for function in functions(path):
            for clause in named(function) if function.decorator_list else ():
                mutants[clause].append(function.name)
    return every, own, mutants


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"), key=lambda path: path.name)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def takes_executor(function: ast.FunctionDef) -> bool:
    """Whether a test is repeated for the executors' names."""
    marks = {ast.unparse(mark) for mark in function.decorator_list}
    return any(mark == "both" or "EXECUTORS" in mark or mark.startswith("catches(") for mark in marks)


def named(function: ast.FunctionDef) -> list[str]:
    in_name = re.match(r"test_([a-z]\d)_", function.name)
    found = CLAUSE.findall(ast.get_docstring(function) or "") + ([in_name[1].upper()] if in_name else [])
    return sorted(set(found))


def cells(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page())
