"""Runs something once a module of another package is imported, and imports it for nobody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

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
    """Finds what is waited for as others would, and has it loaded by a `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        waiting = _waiting.pop(fullname)
        if not _waiting:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, waiting)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, and then does what has waited for it."""

    def __init__(self, own: Loader, waiting: list[Callable[[], None]]) -> None:
        self._own, self._waiting = own, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        for then in self._waiting:
            then()
