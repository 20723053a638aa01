"""Deliberately wrong executors, made by wrapping a right one. The suite must reject every one of them.

A mutant changes what its inner executor is given or returns, so that it applies to any executor. An undetected mutant
is a bug of the suite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_ref.conformance.mutants import adapters, experts, gradients, outputs, routing, slots  # noqa: F401  (they register)
from moe_ref.conformance.mutants._registry import LAYER_MUTANTS, SLOT_MUTANTS
from moe_ref.conformance.wrapped import Wrapped

if TYPE_CHECKING:
    from executors import Executor


def mutants(inner: Executor) -> dict[str, Wrapped]:
    """Every mutant of an executor, by name."""
    slot_changes = {name: Wrapped(name, inner, slots=change) for name, change in SLOT_MUTANTS.items()}
    return slot_changes | {name: Wrapped(name, inner, layer=change) for name, change in LAYER_MUTANTS.items()}
