"""From a name to an executor. Standard library only: nothing is imported before it is asked for.

Built-in executors are lines of `BUILT_IN`; others come by `register`, or from installed packages through entry points
of the group ``moe_ref.executors``.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from executors._protocol import Executor, Unavailable, UnknownExecutor, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

GROUP = "moe_ref.executors"
BUILT_IN = {
    "auto": "executors._auto:Auto",
    "native": "executors.native:Native",
}

Factory = Callable[..., Executor]


@dataclass(frozen=True)
class Entry:
    """Where an executor comes from.

    Attributes:
        name: the name it is asked for by.
        target: "module:attribute", or the factory itself.
        source: "built-in", "registered", or the distribution whose entry point it is.
        clash: why it cannot be had, where two plug-ins claim the name; or "".
    """

    name: str
    target: str | Factory
    source: str
    clash: str = ""

    def __str__(self) -> str:
        return f"{self.target if isinstance(self.target, str) else repr(self.target)} ({self.source})"


@dataclass(frozen=True)
class Explanation:
    """A row of `explain`: whether an executor can be used, and why not."""

    name: str
    usable: bool
    reason: str
    target: str
    source: str


_registered: dict[str, Entry] = {}


def get(name: str, **options: Any) -> Executor:
    """The executor of that name; never another one.

    Args:
        name: one of `names`.
        **options: the executor's own; they never change what is computed.

    Raises:
        UnknownExecutor: no executor has this name.
        Unavailable: it cannot be loaded or used on this machine; says why.
        ValueError: two plug-ins claim the name, or an option has a value that is not allowed.
        TypeError: the executor has no such option.
    """
    entries = _entries()
    if name not in entries:
        close = difflib.get_close_matches(str(name), entries, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UnknownExecutor(f"executor={name!r}: must be one of {', '.join(map(repr, names()))}{hint}")
    factory = _load(entries[name])
    try:
        return factory(**options)
    except TypeError as error:
        allowed = _options(factory)
        unknown = sorted(set(options) - set(allowed)) if allowed is not None else []
        if not unknown:
            raise
        known = f"one of {', '.join(map(repr, allowed or []))}" if allowed else "left out: there are no options"
        raise TypeError(f"option {unknown[0]!r} of executor {name!r}: must be {known}") from error


def names() -> list[str]:
    """All names, sorted, usable here or not."""
    return sorted(_entries())


def available() -> list[str]:
    """The names of executors that can be loaded on this machine, sorted."""
    return [row.name for row in explain() if row.usable]


def explain(x: Tensor | None = None, weights: MoEWeights | None = None) -> list[Explanation]:
    """A row for each executor: usable, or the reason why not.

    Args:
        x: hidden states of the call in question, or None to ask about this machine only.
        weights: the layer in question; given with ``x``.
    """
    return [_explain(entry, x, weights) for _, entry in sorted(_entries().items())]


def register(name: str, target: str | Factory) -> None:
    """Adds an executor for this process.

    Args:
        name: a new name.
        target: "module:attribute", or a factory that takes the options and returns an executor.

    Raises:
        ValueError: the name is taken, or the target is not of that form.
    """
    if isinstance(target, str) and len([part for part in target.split(":") if part]) != 2:
        raise ValueError(f"target={target!r}: must be 'module:attribute' or a callable")
    taken = _entries().get(name)
    entry = Entry(name, target, "registered")
    if taken is not None:
        raise ValueError(f"name={name!r}: must be new, but is taken by {taken}; refused: {entry}")
    _registered[name] = entry


def unregister(name: str) -> None:
    """Takes back what `register` added.

    Raises:
        UnknownExecutor: nothing was registered under this name.
    """
    if name not in _registered:
        raise UnknownExecutor(f"name={name!r}: must be one that was registered in this process")
    del _registered[name]


def _entries() -> dict[str, Entry]:
    built_in = {name: Entry(name, target, "built-in") for name, target in BUILT_IN.items()}
    return _plug_ins() | _registered | built_in


@cache
def _plug_ins() -> dict[str, Entry]:
    """Entry points of installed packages. One that claims a built-in name is refused; two of one name clash."""
    found: dict[str, Entry] = {}
    for point in sorted(set(entry_points(group=GROUP)), key=lambda p: (p.name, p.value)):
        source = point.dist.name if point.dist is not None else "unknown distribution"
        entry = Entry(point.name, point.value, source)
        if point.name in BUILT_IN:
            warnings.warn(f"executor {point.name!r} is built in; refused: {entry}", RuntimeWarning, stacklevel=3)
        elif point.name in found and found[point.name].target != point.value:
            clash = f"executor {point.name!r} is claimed by {found[point.name]} and by {entry}"
            found[point.name] = Entry(point.name, point.value, source, clash)
        else:
            found[point.name] = entry
    return found


def _load(entry: Entry) -> Factory:
    if entry.clash:
        raise ValueError(entry.clash)
    if not isinstance(entry.target, str):
        return entry.target
    module, _, attribute = entry.target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if entry.source == "built-in" and error.name and not error.name.startswith("executors"):
            needs = f'executor {entry.name!r} needs {error.name}: pip install "moe-ref[torch]"'
            raise Unavailable(needs) from error
        raise Unavailable(_broken(entry, error)) from error
    except Exception as error:  # a plug-in may raise anything while it is imported, and must spoil nothing else
        raise Unavailable(_broken(entry, error)) from error


def _broken(entry: Entry, error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"executor {entry.name!r}, {entry}, cannot be loaded: {type(error).__name__}: {said}"


def _explain(entry: Entry, x: Tensor | None, weights: MoEWeights | None) -> Explanation:
    target = entry.target if isinstance(entry.target, str) else repr(entry.target)
    try:
        executor = get(entry.name)
        if x is not None and weights is not None:
            executor.check(x, weights)
    except (Unavailable, Unsupported, ValueError, TypeError) as error:
        return Explanation(entry.name, False, str(error), target, entry.source)
    return Explanation(entry.name, True, "", target, entry.source)


def _options(factory: Factory) -> list[str] | None:
    """The options that a factory takes, where it says."""
    import inspect

    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
