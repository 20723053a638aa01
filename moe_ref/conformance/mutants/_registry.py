"""Where mutants are written down."""

from __future__ import annotations

from moe_ref.conformance.wrapped import LayerChange, SlotChange

SLOT_MUTANTS: dict[str, SlotChange] = {}
DENSE_MUTANTS: dict[str, SlotChange] = {}
PACKED_MUTANTS: dict[str, SlotChange] = {}
LAYER_MUTANTS: dict[str, LayerChange] = {}


def slot_mutant(change: SlotChange) -> SlotChange:
    """Adds a mutant that changes the layer with routing done elsewhere, whatever its weights."""
    SLOT_MUTANTS[change.__name__] = change
    return change


def dense_mutant(change: SlotChange) -> SlotChange:
    """Adds a mutant that changes dense projections, or their gradients."""
    DENSE_MUTANTS[change.__name__] = change
    return change


def packed_mutant(change: SlotChange) -> SlotChange:
    """Adds a mutant that reads projections in 4 bits wrongly."""
    PACKED_MUTANTS[change.__name__] = change
    return change


def layer_mutant(change: LayerChange) -> LayerChange:
    """Adds a mutant that changes the layer with its routing."""
    LAYER_MUTANTS[change.__name__] = change
    return change
