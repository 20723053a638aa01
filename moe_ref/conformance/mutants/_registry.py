"""Where mutants are written down."""

from __future__ import annotations

from moe_ref.conformance.wrapped import LayerChange, SlotChange

SLOT_MUTANTS: dict[str, SlotChange] = {}
LAYER_MUTANTS: dict[str, LayerChange] = {}


def slot_mutant(change: SlotChange) -> SlotChange:
    """Adds a mutant that changes the layer with routing done elsewhere."""
    SLOT_MUTANTS[change.__name__] = change
    return change


def layer_mutant(change: LayerChange) -> LayerChange:
    """Adds a mutant that changes the layer with its routing."""
    LAYER_MUTANTS[change.__name__] = change
    return change
