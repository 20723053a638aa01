"""Failures that an adopter knows of, by clause, in a JSON file of their own repository.

They are strict: what is listed and holds fails the run, so that the list never outlives its reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_ref.conformance.judgement.checks import labels
from moe_ref.conformance.judgement.faults import Fault
from moe_ref.conformance.reporting.form import read_form

FORMAT = "moe-ref expected failures 1"


class BadExpectationsError(ValueError):
    """A file of expected failures is not of the form; the message says in one line what is."""


@dataclass(frozen=True)
class Expected:
    """One expected failure.

    Attributes:
        executor: the registered name of the executor whose it is.
        reason: why it is expected, such as the address of an issue.
        clause: of docs/spec.md, or another thing that a failure is said to break, such as "the law append_slot".
        raises: the name of an exception that the executor raises, or under ``--isolate`` of the signal that ends its
            process, or "hang" or "exit"; given in place of a clause.
        tensor: "y", or the input whose gradient is meant; "" is any.
        dtype: of x; "" is any.
        test: a pattern for the test's name, such as "test_exact_cases*many_rows*".
    """

    executor: str
    reason: str
    clause: str = ""
    raises: str = ""
    tensor: str = ""
    dtype: str = ""
    test: str = "*"

    def covers(self, fault: Fault, dtype: str, test: str) -> bool:
        """Whether a fault is this one."""
        return (
            self.clause in labels(fault.clause)
            and self.tensor in ("", fault.tensor)
            and self.dtype in ("", dtype)
            and fnmatchcase(test, self.test)
        )

    def covers_raised(self, error: BaseException, test: str) -> bool:
        """Whether an exception is this one."""
        return self.covers_end(type(error).__name__, test)

    def covers_end(self, how: str, test: str) -> bool:
        """Whether a test's end is this one: by an exception, a signal or a hang, each by its name."""
        return how == self.raises and fnmatchcase(test, self.test)

    def __str__(self) -> str:
        """What is expected, without the reason."""
        more = [self.tensor, self.dtype, "" if self.test == "*" else self.test]
        return " ".join(filter(None, [self.clause or f"raises {self.raises}", *more]))


KEYS = tuple(f.name for f in fields(Expected) if f.name != "executor")


def read_expected(path: Path) -> tuple[Expected, ...]:
    """Reads a file of expected failures.

    Raises:
        BadExpectationsError: it is missing, or not of the form.
    """
    found = read_form(path, FORMAT, BadExpectationsError)
    own = found.get("executors")
    if not isinstance(own, dict) or found.keys() != {"format", "executors"}:
        raise BadExpectationsError(f"{path}: executors={own!r:.60}: must be an object, and all there is beside format")
    return tuple(
        _expected(f"{path}: {executor}[{place}]", executor, entry)
        for executor, entries in own.items()
        for place, entry in enumerate(_list(f"{path}: {executor}", entries))
    )


def _list(where: str, entries: Any) -> list[Any]:
    if not isinstance(entries, list):
        raise BadExpectationsError(f"{where}={entries!r:.60}: must be a list")
    return entries


def _expected(where: str, executor: str, entry: Any) -> Expected:
    if not isinstance(entry, dict):
        raise BadExpectationsError(f"{where}={entry!r:.60}: must be an object")
    for key, value in entry.items():
        if key not in KEYS:
            raise BadExpectationsError(f"{where}: {key!r:.60}: must be one of {', '.join(KEYS)}")
        if not isinstance(value, str) or not value:
            raise BadExpectationsError(f"{where}: {key}={value!r:.60}: must be a text that is not empty")
    if "reason" not in entry:
        raise BadExpectationsError(f"{where}: reason: must be given")
    if ("clause" in entry) == ("raises" in entry):
        raise BadExpectationsError(f"{where}: clause, raises: must be one of them")
    if "raises" in entry and {"tensor", "dtype"} & entry.keys():
        raise BadExpectationsError(f"{where}: tensor, dtype: must not stand beside raises")
    return Expected(executor, **entry)
