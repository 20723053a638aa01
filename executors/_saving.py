"""Declares safe for ``torch.load(weights_only=True)`` what `moe_ref.types` needs, as soon as there is torch."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from moe_ref.types import rebuild


def declare_safe() -> None:
    """Declares it now if torch is imported, or else when it is: this imports no torch."""
    if "torch" in sys.modules:
        sys.modules["torch"].serialization.add_safe_globals([rebuild])
    elif not any(isinstance(finder, _AtTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtTorch())


class _AtTorch(MetaPathFinder):
    """Finds torch by the other finders, and declares when it has been executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                declare_safe()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
