"""Deliberately wrong executors, made by wrapping a right one. The suite must reject all of them.

A mutant changes the inputs or outputs of its inner executor, so it applies to any executor. An undetected mutant is a
bug in the suite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_ref.conformance.mutants import (  # noqa: F401  (they register)
    activations,
    adapters,
    experts,
    gradients,
    mixed,
    mxfp4,
    norms,
    outputs,
    packed,
    ranges,
    routing,
    scoring,
    second_derivatives,
    slots,
)
from moe_ref.conformance.mutants._registry import (
    DENSE_MUTANTS,
    LAYER_MUTANTS,
    MIXED_MUTANTS,
    PACKED_KINDS,
    PACKED_MUTANTS,
    RANGE_MUTANTS,
    SECOND_MUTANTS,
    SLOT_MUTANTS,
)
from moe_ref.conformance.wrapped import Wrapped

if TYPE_CHECKING:
    from executors import Executor


def mutants(inner: Executor) -> dict[str, Wrapped]:
    """The mutants of an executor by name, for the kinds of weights that the executor takes."""
    kinds, left_out = inner.capabilities.weights, set() if inner.capabilities.mixed else MIXED_MUTANTS
    misread = {n: change for n, change in PACKED_MUTANTS.items() if kinds & PACKED_KINDS[n] and n not in left_out}
    overflowing = RANGE_MUTANTS if "float16" in inner.capabilities.dtypes else {}
    changes = SLOT_MUTANTS | SECOND_MUTANTS | overflowing | (DENSE_MUTANTS if "dense" in kinds else {}) | misread
    slot_changes = {name: Wrapped(name, inner, slots=change) for name, change in changes.items()}
    return slot_changes | {name: Wrapped(name, inner, layer=change) for name, change in LAYER_MUTANTS.items()}
