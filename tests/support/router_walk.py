"""Finds the routers of the installed transformers: which class feeds which experts, read from the text of its models.

A family is a folder of transformers.models with experts that transformers dispatches. A router is what a block of the
family calls to get what it passes to its experts, or a class whose name ends in "Router".
"""

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import transformers

DISPATCHED = "@use_experts_implementation"
MODELS = Path(transformers.__file__).parent / "models"


@dataclass(frozen=True)
class Place:
    """A router's class, and a block that has one under ``attribute``; both "" where no block uses it."""

    family: str
    router: str
    block: str = ""
    attribute: str = ""

    def get(self, name: str) -> type:
        """A class of the family, by name."""
        return getattr(importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}"), name)


# With experts that transformers does not dispatch; their weights are taken by hand.
BESIDES = (Place("llama4", "Llama4Router", "Llama4TextMoe", "router"),)


@cache
def places() -> tuple[Place, ...]:
    """A place for every router class of every family, the first block that uses it, in order; then `BESIDES`."""
    found: dict[tuple[str, str], Place] = {}
    for family, tree in families():
        used = [place for node in tree.body if isinstance(node, ast.ClassDef) for place in _of_block(family, node)]
        assert used, f"{family}: has experts, and no router was found in its text"
        named = [Place(family, n.name) for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Router")]
        for place in [*used, *named]:
            found.setdefault((family, place.router), place)
    return tuple(found[key] for key in sorted(found)) + BESIDES


def families() -> Iterator[tuple[str, ast.Module]]:
    """Families, with the text of their model."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        if DISPATCHED in text and path.stem == f"modeling_{path.parent.name}":
            yield path.parent.name, ast.parse(text)


def _of_block(family: str, block: ast.ClassDef) -> Iterator[Place]:
    """Routers of a class that calls ``self.experts(x, ids, weights)``: what it calls to get ids and weights."""
    wanted = {
        argument.id for call in _calls(block, "experts") for argument in call.args[1:] if isinstance(argument, ast.Name)
    }
    for node in ast.walk(block):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        attribute = _own(node.value.func)
        targets = {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        if attribute and targets & wanted:
            for name in _classes(block, attribute):
                yield Place(family, name, block.name, attribute)


def _calls(block: ast.ClassDef, attribute: str) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(block) if isinstance(node, ast.Call) and _own(node.func) == attribute)


def _own(node: ast.expr) -> str:
    """The name in ``self.name``, or ""."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else ""


def _classes(block: ast.ClassDef, attribute: str) -> Iterator[str]:
    """Classes of what the constructor puts under ``self.attribute``."""
    for node in ast.walk(block):
        if isinstance(node, ast.Assign) and any(_own(target) == attribute for target in node.targets):
            calls = (call for call in ast.walk(node.value) if isinstance(call, ast.Call))
            yield from (call.func.id for call in calls if isinstance(call.func, ast.Name))
