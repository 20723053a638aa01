"""Calls the suite's checks on an executor, lets pass what is expected to fail, and says how to run a failure again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.judgement.faults import RAISED
from moe_ref.conformance.reporting.expected import Expected
from moe_ref.conformance.reporting.ledger import AGAIN

if TYPE_CHECKING:
    from executors import Executor

SETUP = "from moe_ref.conformance.reporting.again import *; "


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
    """

    name: str
    executor: Executor
    device: str
    expected: Sequence[Expected] = ()
    test: str = ""
    met: list[Expected] = field(default_factory=list)

    def __call__(self, check: Callable[..., Any], *arguments: Any) -> Any:
        """What a check returns, or None if all that it found is expected.

        Args:
            check: a function of (executor, *arguments, device).
            *arguments: between these two.

        Raises:
            ConformanceError: with what is not expected.
        """
        try:
            return check(self.executor, *arguments, self.device)
        except ConformanceError as error:
            left = [fault for fault in error.faults if not self._expects(fault, error.problem.dtype)]
            if not left:
                return None
            error = error.only(left)
            error.add_note(self._again(check, arguments))
            raise error from None
        except RAISED as error:
            if found := [own for own in self.expected if own.covers_raised(error, self.test)]:
                self.met += found
                return None
            error.add_note(self._again(check, arguments))
            raise

    def _expects(self, fault: Any, dtype: str) -> bool:
        found = [own for own in self.expected if own.covers(fault, dtype, self.test)]
        self.met += found
        return bool(found)

    def _again(self, check: Callable[..., Any], arguments: Sequence[Any]) -> str:
        device = [] if self.device == "cpu" else [f"device={self.device!r}"]
        call = ", ".join([f"get({self.name!r})", *map(repr, arguments), *device])
        return f"{AGAIN}{SETUP}{check.__name__}({call})"
