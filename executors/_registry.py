"""From a name to an executor. Standard library only: nothing is imported before it is asked for.

Built-in executors are lines of `BUILT_IN`; others come by `register`, or from installed packages through entry points
of the group ``moe_ref.executors``.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from executors._protocol import Executor, NotingExecutor, Unavailable, UnknownExecutor, Unsupported, check_norm

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

GROUP = "moe_ref.executors"
BUILT_IN = {
    "auto": "executors.auto:Auto",
    "grouped_mm": "executors.grouped_mm:GroupedMM",
    "grouped_nf4": "executors.grouped_nf4:GroupedNF4",
    "native": "executors.native:Native",
    "numba": "executors.numba:Numba",
    "triton": "executors.triton:Triton",
}
EXTRAS = {
    "llvmlite": "numba",
    "numba": "numba",
    "triton": "triton",
}  # of this distribution, by what they bring; all else comes with "torch"
ELSEWHERE = "a name that a conftest.py registers exists in its runs of pytest alone"
NO_FACTORY = "is an executor itself, but must be a factory of one, such as its class or lambda: executor"

Factory = Callable[..., Executor]
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Origin:
    """The module that called `register`.

    Attributes:
        module: its name, such as "conftest".
        file: its file, or "".
    """

    module: str
    file: str


@dataclass(frozen=True)
class Entry:
    """Where an executor comes from.

    Attributes:
        name: the name it is asked for by.
        target: "module:attribute", or the factory itself.
        source: "built-in", "registered", or "from distribution D"; of all claimants where there are several.
        clash: why it cannot be had, where several plug-ins claim the name; or "".
        origin: who registered it in this process, or None.
    """

    name: str
    target: str | Factory
    source: str
    clash: str = ""
    origin: Origin | None = None

    @property
    def target_name(self) -> str:
        """The target as text."""
        return self.target if isinstance(self.target, str) else repr(self.target)

    def __str__(self) -> str:
        return f"executor {self.name!r} ({self.source}, {self.target_name})"


@dataclass(frozen=True)
class Explanation:
    """A row of `explain`.

    Attributes:
        name: the executor's name.
        usable: whether `get` gives it here and, where an input was given, whether it takes that input.
        reason: why not, in one line; "" if usable.
        target: "module:attribute", or the registered factory as text.
        source: "built-in", "registered", or "from distribution D".
        note: what to know of a call that works, such as that it waits for the GPU; or "".
        weights: the kinds of projections that it declares, of "dense", "nf4", "fp4", "mxfp4", sorted; empty where it
            cannot be had.
    """

    name: str
    usable: bool
    reason: str
    target: str
    source: str
    note: str = ""
    weights: tuple[str, ...] = ()


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
    if not isinstance(name, str) or name not in entries:
        close = difflib.get_close_matches(str(name), entries, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else f"; {ELSEWHERE}"
        raise UnknownExecutor(f"executor={name!r}: must be one of {', '.join(map(repr, sorted(entries)))}{hint}")
    entry = entries[name]
    factory = _load(entry)
    _check_options(name, factory, options)
    return _call(entry, "made", partial(factory, **options), passing=(Unavailable, ValueError, TypeError))


def names() -> list[str]:
    """All names, sorted, usable here or not.

    `explain` has what each of them takes: ``grouped_nf4``, for one, all kinds of 4 bits, MXFP4 too.
    """
    return sorted(_entries())


def available() -> list[str]:
    """The names of executors that can be had on this machine, sorted."""
    return [row.name for row in explain() if row.usable]


def explain(x: Tensor | None = None, weights: MoEWeights | None = None) -> list[Explanation]:
    """A row for each executor, sorted by name: usable, or the reason why not.

    Args:
        x: [..., H] hidden states of the call in question, or None to ask about this machine only.
        weights: the layer in question; given with ``x``.

    Raises:
        TypeError: one of the two arguments without the other.
    """
    if (x is None) != (weights is None):
        missing = "x" if x is None else "weights"
        raise TypeError(f"{missing}=None: x and weights must be given together")
    return [_explain(entry, x, weights) for _, entry in sorted(_entries().items())]


def register(name: str, target: str | Factory) -> None:
    """Adds an executor for this process.

    Args:
        name: a new name.
        target: "module:attribute", or a factory that takes the options and returns an executor.

    Raises:
        ValueError: the name is taken, or the text of the target is not of that form.
        TypeError: the name is no text, or the target is neither text nor callable, or an executor itself.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name={name!r}: must be text, and not empty")
    if isinstance(target, str) and [bool(part) for part in target.split(":")] != [True, True]:
        raise ValueError(f"target={target!r}: must be 'module:attribute' or a callable")
    if not isinstance(target, str) and not callable(target):
        raise TypeError(f"target={target!r}: must be 'module:attribute' or a callable")
    if _is_executor(target):
        raise TypeError(f"target: a {type(target).__name__} {NO_FACTORY}")
    caller = sys._getframe(1).f_globals
    origin = Origin(str(caller.get("__name__", "")), str(caller.get("__file__") or ""))
    entry = Entry(name, target, "registered", origin=origin)
    taken = _entries().get(name)
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


def origin(name: str) -> Origin | None:
    """Who registered an executor in this process; None for one that every process has, and for an unknown name."""
    entry = _registered.get(name)
    return entry.origin if entry is not None else None


def _is_executor(target: Any) -> bool:
    """Whether it is an executor, which can be called as a factory can, and not a class of them."""
    return not isinstance(target, type) and callable(getattr(target, "experts", None))


def _entries() -> dict[str, Entry]:
    built_in = {name: Entry(name, target, "built-in") for name, target in BUILT_IN.items()}
    return _plug_ins() | _registered | built_in


@cache
def _plug_ins() -> dict[str, Entry]:
    """Entry points of installed packages; ``_plug_ins.cache_clear()`` reads them anew.

    One that claims a built-in name is refused. Several that claim the same name clash: none of them can be had.
    """
    claims: dict[str, set[tuple[str, str]]] = defaultdict(set)  # a set: one package may be found twice on sys.path
    for point in entry_points(group=GROUP):
        distribution = point.dist.name if point.dist is not None else "unknown"
        claims[point.name].add((f"from distribution {distribution}", point.value))
    found = {}
    for name, claimants in sorted(claims.items()):
        entries = [Entry(name, target, source) for source, target in sorted(claimants)]
        if name in BUILT_IN:
            refused = "; ".join(map(str, entries))
            warnings.warn(f"executor {name!r} is built in; refused: {refused}", RuntimeWarning, stacklevel=2)
        else:
            found[name] = entries[0] if len(entries) == 1 else _clash(entries)
    return found


def _clash(entries: list[Entry]) -> Entry:
    targets = " and ".join(entry.target_name for entry in entries)
    sources = " and ".join(entry.source for entry in entries)
    name = entries[0].name
    return Entry(name, targets, sources, f"executor={name!r}: claimed by {' and by '.join(map(str, entries))}")


def _load(entry: Entry) -> Factory:
    if entry.clash:
        raise ValueError(entry.clash)
    if not isinstance(entry.target, str):
        return entry.target
    try:
        found = _call(entry, "loaded", EntryPoint(entry.name, entry.target, GROUP).load)
    except Unavailable as error:
        name = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        missing = (name or "").partition(".")[0]
        if entry.source != "built-in" or missing in ("", "executors"):
            raise
        raise Unavailable(
            f'executor {entry.name!r} needs {missing}: pip install "moe-ref[{EXTRAS.get(missing, "torch")}]"'
        ) from error.__cause__
    if _is_executor(found):
        raise Unavailable(f"{entry} cannot be made: it {NO_FACTORY}")
    return found


def _call(
    entry: Entry, doing: str, action: Callable[[], Returned], passing: tuple[type[Exception], ...] = ()
) -> Returned:
    """Runs code that may be foreign: whatever it raises, but for ``passing``, becomes Unavailable.

    This is the one place that catches every exception: a plug-in can raise anything (and some exit) while it is
    imported, made or asked, and must not spoil what others do with the remaining executors.
    """
    try:
        return action()
    except passing:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unavailable(f"{entry} cannot be {doing}: {said}") from error


def _check_options(name: str, factory: Factory, options: dict[str, Any]) -> None:
    allowed = _options(factory)
    unknown = [] if allowed is None else sorted(set(options) - set(allowed))
    if unknown:
        known = f"must be one of {', '.join(map(repr, allowed or []))}" if allowed else "there are no options"
        raise TypeError(f"option {unknown[0]}={options[unknown[0]]!r} of executor {name!r}: {known}")


def _options(factory: Factory) -> list[str] | None:
    """The options that a factory takes, or None where it does not say."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _explain(entry: Entry, x: Tensor | None, weights: MoEWeights | None) -> Explanation:
    reason = note = ""
    kinds: tuple[str, ...] = ()
    refusals = (Unavailable, Unsupported, ValueError, TypeError)
    try:
        executor = get(entry.name)
        kinds = _call(entry, "asked", partial(_kinds, executor), passing=refusals)
        if x is not None and weights is not None:
            _call(entry, "asked", partial(executor.check, x, weights), passing=refusals)
            _call(entry, "asked", partial(check_norm, executor, weights), passing=refusals)
            if isinstance(executor, NotingExecutor):
                note = _call(entry, "asked", partial(executor.note, x, weights), passing=refusals)
    except refusals as error:
        reason = " ".join(str(error).split())
    return Explanation(entry.name, not reason, reason, entry.target_name, entry.source, note, kinds)


def _kinds(executor: Executor) -> tuple[str, ...]:
    return tuple(sorted(getattr(getattr(executor, "capabilities", None), "weights", ())))
