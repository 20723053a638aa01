"""Runs something once a module of another package is imported, and imports it for nobody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[], None]]] = {}


def after_import(name: str, then: Callable[[], None]) -> None:
    """Calls ``then`` now if the module is imported already, else right after it is.

    Args:
        name: of the module, such as "torch.utils.flop_counter".
        then: what to do.
    """
    if name in sys.modules:
        then()
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(name, []).append(then)


class _Finder(MetaPathFinder):
    """Finds what is waited for by the other finders. It waits on where a module is looked for and not imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for then in _waiting.pop(fullname, ()):
                then()
            if not _waiting and self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
