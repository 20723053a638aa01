"""Calls the suite's checks on an executor, lets pass what is expected to fail, and says how to run a failure again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.judgement.faults import RAISED, Fault
from moe_ref.conformance.reporting.expected import Expected
from moe_ref.conformance.reporting.ledger import AGAIN
from moe_ref.conformance.reporting.pasted import SETUP, before
from moe_ref.conformance.reporting.search import Search, cause

if TYPE_CHECKING:
    from executors import Executor


@dataclass
class Judge:
    """An executor under judgement.

    Attributes:
        name: by which it is registered.
        executor: what is judged.
        device: where.
        expected: its expected failures.
        test: the name of the test that runs, such as "test_exact_cases[mine-long_sums-bfloat16]".
        met: expected failures that this test met.
        search: how far a failure of this test is still made simpler.
        notes: is told each call before it is judged, lest it end the process.
    """

    name: str
    executor: Executor
    device: str
    expected: Sequence[Expected] = ()
    test: str = ""
    met: list[Expected] = field(default_factory=list)
    search: Search = field(default_factory=Search)
    notes: Callable[[str], None] | None = None

    def __repr__(self) -> str:
        """Without what the executor declares."""
        return f"Judge({self.name!r})"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """How Hypothesis prints it with each failure."""
        printer.text(repr(self))

    def start(self, test: str) -> None:
        """Begins with another test."""
        self.test, self.met = test, []
        self.search.start()

    def __call__(self, check: Callable[..., Any], *arguments: Any) -> Any:
        """What a check returns, or None if all that it found is expected, or if no more is to be looked for.

        Args:
            check: a function of (executor, *arguments, device).
            *arguments: between these two.

        Raises:
            ConformanceError: with what is not expected.
        """
        again = self._again(check, arguments)
        if not self.search.wants(again):
            return None
        if self.notes is not None:
            self.notes(again)
        try:
            with _noted(again):
                return check(self.executor, *arguments, self.device)
        except ConformanceError as error:
            left = [fault for fault in error.faults if not self._expects(fault, error.problem.dtype)]
            if not left:
                return None
            self.search.failed(again, {_known_as(fault) for fault in left})
            error = error.only(left)
            if again not in getattr(error, "__notes__", ()):
                error.add_note(again)
            raise error from None
        except RAISED as error:
            if found := [own for own in self.expected if own.covers_raised(error, self.test)]:
                self.met += found
                return None
            self.search.failed(again, {f"{type(error).__name__} {cause(str(error))}"})
            raise

    def _expects(self, fault: Any, dtype: str) -> bool:
        found = [own for own in self.expected if own.covers(fault, dtype, self.test)]
        self.met += found
        return bool(found)

    def _again(self, check: Callable[..., Any], arguments: Sequence[Any]) -> str:
        device = [] if self.device == "cpu" else [f"device={self.device!r}"]
        call = ", ".join([f"get({self.name!r})", *map(repr, arguments), *device])
        return f"{AGAIN}{before(self.name)}{SETUP}{check.__name__}({call})"


@contextmanager
def _noted(again: str) -> Iterator[None]:
    """Whatever is raised says how to run it again, also what no executor may raise."""
    try:
        yield
    except BaseException as error:
        error.add_note(again)
        raise


def _known_as(fault: Fault) -> str:
    """What a failure is known by: that a law is broken follows from wrong values."""
    why = cause(fault.message, fault.tensor)
    return why if fault.clause.startswith("the law ") else f"{fault.clause} {why}"
