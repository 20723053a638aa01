"""What stands before a failure's call, so that it runs when it is pasted into Python in the folder of the run."""

from __future__ import annotations

from pathlib import Path

SETUP = "from moe_ref.conformance.reporting.again import *; "


def before(name: str) -> str:
    """Statements that register an executor which another process does not know, such as "import conftest; "; or "".

    Args:
        name: of the executor.
    """
    from executors import _registry

    origin = _registry.origin(name)
    if origin is None or not Path(origin.file).is_file():
        return ""
    file, here = Path(origin.file).resolve(), Path.cwd()
    shown = str(file.relative_to(here) if file.is_relative_to(here) else file)
    parts = origin.module.split(".")
    root = _root(file, parts)
    if root is None:  # as pytest's import mode "importlib" may name it
        return f"import runpy; runpy.run_path({shown!r}); "
    if root == here:
        return f"import {origin.module}; "
    folder = str(root.relative_to(here) if root.is_relative_to(here) else root)
    return f"import sys; sys.path.insert(0, {folder!r}); import {origin.module}; "


def _root(file: Path, parts: list[str]) -> Path | None:
    """The folder from which a module of this name is imported, or None where it cannot be."""
    place = file.parent if file.name == "__init__.py" else file.with_suffix("")
    if not all(part.isidentifier() for part in parts) or [*place.parts[-len(parts) :]] != parts:
        return None
    return place.parents[len(parts) - 1]
