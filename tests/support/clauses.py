"""Every clause's way: the source of docs/clauses.md, which ``python tests/support/clauses.py`` rewrites.

Docstrings are read. What names a clause in its docstring, or stands in a module whose docstring does, belongs to it. A
test also belongs to the clause in its name. Tests that run on every executor are those of the suite; a few others run
on `native` and on `grouped_mm`, and are told apart.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "clauses.md"
SUITE = ROOT / "moe_ref" / "conformance" / "suite.py"
CLAUSE = re.compile(r"\b([TRGECDQM]\d)\b")
RANGE = re.compile(r"\b([TRGECDQM])(\d) to \1(\d)\b")
# About implementations: the specification computes in float64 and keeps nothing, so none of its functions does it.
OF_IMPLEMENTATIONS = ("Q6", "T2", "R6", "E4", "E5", "E7", "C2", "D4", "D5")
HEAD = """# Clauses, and everything that stands for them

`python tests/support/clauses.py` makes this page from docstrings. Under each clause of [spec.md](spec.md) it links:

- **specification**: the functions of `moe_ref` that are the clause, in float64;
- **kernels and executors**: what computes it on a device, Triton's kernels first;
- **suite**: tests that run on whatever executor they are given; **native and grouped_mm**: tests that run on these two;
- **tests**: of the specification, of one executor, or of the project;
- **mutants**: wrong executors that break the clause, each of which the suite must reject.
"""


@dataclass
class Way:
    """What stands for a clause: names with their files, by kind."""

    found: dict[str, dict[Path, list[str]]] = field(default_factory=dict)

    def add(self, kind: str, path: Path, name: str) -> None:
        """Adds a name, or "" for a whole file."""
        names = self.found.setdefault(kind, {}).setdefault(path, [])
        if name and name not in names:
            names.append(name)

    def names(self, kind: str) -> list[str]:
        """All names of a kind."""
        return [name for names in self.found.get(kind, {}).values() for name in names]


KINDS = ("specification", "kernels and executors", "suite", "native and grouped_mm", "tests", "mutants")


def page() -> str:
    """The whole page."""
    ways = held_by()
    return HEAD + "".join(section(clause, sentence, ways[clause]) for clause, sentence in sentences().items())


def section(clause: str, sentence: str, way: Way) -> str:
    """A clause with its lists."""
    lines = [f"\n## {clause}\n", f"{sentence}\n"]
    for kind in KINDS:
        cells = [cell(path, names) for path, names in way.found.get(kind, {}).items()]
        if kind == "specification" and not cells:
            cells = ["none: the clause is about implementations"]
        if cells:
            lines.append(f"- **{kind}**: {'; '.join(cells)}")
    return "\n".join(lines) + "\n"


def cell(path: Path, names: list[str]) -> str:
    """A link to a file, and what it has for the clause."""
    place = path.relative_to(ROOT)
    shown = str(place.with_suffix("")).removesuffix("/__init__")
    link = f"[{shown}](../{place})"
    return f"{link} {', '.join(f'`{name}`' for name in names)}" if names else link


def clauses() -> list[str]:
    """The clauses of docs/spec.md, in its order."""
    return list(sentences())


def sentences() -> dict[str, str]:
    """By clause, its first sentence."""
    text = (ROOT / "docs" / "spec.md").read_text()
    found = re.findall(r"^\*\*([A-Z]\d)\.\*\* (.*?)(?:\n\n|\n```)", text, flags=re.MULTILINE | re.DOTALL)
    return {clause: first_sentence(" ".join(body.split())).replace("](#", "](spec.md#") for clause, body in found}


def first_sentence(text: str) -> str:
    """Up to a full stop or a colon, that a space and a capital or nothing follow."""
    return re.split(r"(?<=[^.]\.)\s(?=[A-Z`(*])|:$|:\s", text)[0].rstrip(":").rstrip(".") + "."


def held_by() -> dict[str, Way]:
    """By clause, everything that stands for it."""
    ways = {clause: Way() for clause in clauses()}
    for path in files("moe_ref"):
        if "conformance" not in path.parts:
            _add_definitions(ways, "specification", path)
    for folder in ("executors/_triton/kernels", "executors"):
        for path in files(folder):
            if not {"_cli", "_bench", "_compare", "_tune", "_crossover"} & set(path.parts):
                _add_definitions(ways, "kernels and executors", path)
    for path in (SUITE, *files("tests"), *files("property_tests")):
        for function in functions(path):
            if function.name.startswith("test_"):
                kind = "suite" if path == SUITE else "native and grouped_mm" if takes_executor(function) else "tests"
                for clause in named(function):
                    ways[clause].add(kind, path, function.name)
    for path in files("moe_ref/conformance/mutants"):
        for function in functions(path):
            for clause in named(function) if function.decorator_list else ():
                ways[clause].add("mutants", path, function.name)
    return ways


def _add_definitions(ways: dict[str, Way], kind: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    for clause in mentioned(ast.get_docstring(tree)):
        ways[clause].add(kind, path, "")
    for name, docstring in definitions(tree):
        for clause in mentioned(docstring):
            ways[clause].add(kind, path, name)


def definitions(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Functions and classes with their docstrings, methods with their class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, ast.get_docstring(node)
        elif isinstance(node, ast.ClassDef):
            yield node.name, ast.get_docstring(node)
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", ast.get_docstring(inner)


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def takes_executor(function: ast.FunctionDef) -> bool:
    """Whether a test is repeated for the executors' names."""
    marks = {ast.unparse(mark) for mark in function.decorator_list}
    return any(mark == "both" or "EXECUTORS" in mark or mark.startswith("catches(") for mark in marks)


def named(function: ast.FunctionDef) -> list[str]:
    in_name = re.match(r"test_([a-z]\d)_", function.name)
    return sorted(mentioned(ast.get_docstring(function)) | ({in_name[1].upper()} if in_name else set()))


def mentioned(docstring: str | None) -> set[str]:
    """The clauses that a docstring names, one by one or as a range."""
    text = docstring or ""
    found = set(CLAUSE.findall(text))
    for letter, first, last in RANGE.findall(text):
        found |= {f"{letter}{number}" for number in range(int(first), int(last) + 1)}
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
