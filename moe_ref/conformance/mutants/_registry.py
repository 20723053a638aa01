"""Where mutants are written down."""

from __future__ import annotations

from collections.abc import Callable

from moe_ref.conformance.wrapped import LayerChange, SlotChange

SLOT_MUTANTS: dict[str, SlotChange] = {}
DENSE_MUTANTS: dict[str, SlotChange] = {}
PACKED_MUTANTS: dict[str, SlotChange] = {}
PACKED_KINDS: dict[str, frozenset[str]] = {}  # of each of those: the kinds of weights that it misreads
NF4, MXFP4 = ("nf4", "fp4"), ("mxfp4",)
LAYER_MUTANTS: dict[str, LayerChange] = {}
RANGE_MUTANTS: dict[str, SlotChange] = {}


def slot_mutant(change: SlotChange) -> SlotChange:
    """Adds a mutant that changes the layer with routing done elsewhere, whatever its weights."""
    SLOT_MUTANTS[change.__name__] = change
    return change


def dense_mutant(change: SlotChange) -> SlotChange:
    """Adds a mutant that changes dense projections, or their gradients."""
    DENSE_MUTANTS[change.__name__] = change
    return change


def packed_mutant(*kinds: str) -> Callable[[SlotChange], SlotChange]:
    """Adds a mutant that reads projections in 4 bits wrongly, of these kinds; of others it changes nothing."""

    def add(change: SlotChange) -> SlotChange:
        PACKED_MUTANTS[change.__name__] = change
        PACKED_KINDS[change.__name__] = frozenset(kinds)
        return change

    return add


def range_mutant(change: SlotChange) -> SlotChange:
    """Adds a mutant that overflows in fp16: only layers that pass its range show it, and not all of those."""
    RANGE_MUTANTS[change.__name__] = change
    return change


def layer_mutant(change: LayerChange) -> LayerChange:
    """Adds a mutant that changes the layer with its routing."""
    LAYER_MUTANTS[change.__name__] = change
    return change
