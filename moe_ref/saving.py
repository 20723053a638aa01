"""How the dataclasses are copied, pickled and saved by torch: by a function that makes whole ones only.

``torch.load(weights_only=True)`` calls nothing but functions that are declared safe, and makes objects of classes that
are declared safe without calling their constructors. So `rebuild` is declared safe and the classes are not: no file
makes an object that lacks a field, or has one too many. What the fields hold is validated where the object is used.
"""

from __future__ import annotations

import copyreg
from dataclasses import MISSING, fields
from typing import Any, TypeVar

Kind = TypeVar("Kind")
KINDS: dict[str, type[Any]] = {}  # by name: those that are decorated


def saved(kind: type[Kind]) -> type[Kind]:
    """A decorator for dataclasses of this package, which `rebuild` makes then."""
    KINDS[kind.__name__] = kind
    kind.__reduce__ = _reduce  # type: ignore[method-assign]
    return kind


def rebuild(name: str, values: dict[str, Any]) -> Any:
    """An object of a dataclass of `moe_ref.types`. Files name this function: it keeps its place and its arguments.

    Args:
        name: of the dataclass.
        values: of its fields. One that is missing has its default, so that files of earlier versions are read.

    Raises:
        ValueError: there is no such dataclass, it has no such field, or a field that has no default is missing.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"saved object is a {name!r:.60}: must be one of {', '.join(sorted(KINDS))}")
    known = {field.name: field for field in fields(KINDS[name])}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"saved {name} has {type(values).__name__}: must have a dict of fields by name")
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"saved {name} has {unknown[0]!r:.60}: must have {', '.join(known)} alone")
    for key, field in known.items():
        if key not in values and field.default is MISSING:
            raise ValueError(f"saved {name} has no {key}: must have it")
    return KINDS[name](**values)


def _reduce(self: Any) -> tuple[Any, ...]:
    kind = type(self)
    if KINDS.get(kind.__name__) is kind:
        return rebuild, (kind.__name__, {field.name: getattr(self, field.name) for field in fields(self)})
    return copyreg.__newobj__, (kind,), vars(self)  # type: ignore[attr-defined]  # a class derived elsewhere
