"""Where mutants are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moe_ref.conformance.wrapped import LayerChange, SlotChange

Change = TypeVar("Change", SlotChange, LayerChange)

SLOT_MUTANTS: dict[str, SlotChange] = {}  # change the layer with routing done elsewhere, whatever its weights
DENSE_MUTANTS: dict[str, SlotChange] = {}  # change dense projections, or their gradients
PACKED_MUTANTS: dict[str, SlotChange] = {}  # misread projections in 4 bits
PACKED_KINDS: dict[str, frozenset[str]] = {}  # the kinds of weights that each of those misreads; others it leaves alone
NF4, MXFP4 = ("nf4", "fp4"), ("mxfp4",)
MIXED_MUTANTS: set[str] = set()  # of those, the ones that only a layer with two kinds of projections shows
LAYER_MUTANTS: dict[str, LayerChange] = {}  # change the layer with its routing
RANGE_MUTANTS: dict[str, SlotChange] = {}  # overflow in fp16: only some layers that pass its range show it

SECOND_MUTANTS: dict[str, SlotChange] = {}  # wrong in second derivatives alone


def _adds_to(mutants: dict[str, Change]) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        mutants[change.__name__] = change
        return change

    return add


slot_mutant = _adds_to(SLOT_MUTANTS)
dense_mutant = _adds_to(DENSE_MUTANTS)
layer_mutant = _adds_to(LAYER_MUTANTS)
range_mutant = _adds_to(RANGE_MUTANTS)
second_mutant = _adds_to(SECOND_MUTANTS)


def packed_mutant(*kinds: str, mixed: bool = False) -> Callable[[SlotChange], SlotChange]:
    """Adds a mutant that misreads projections in 4 bits of these kinds; if ``mixed``, only beside another kind."""

    def add(change: SlotChange) -> SlotChange:
        PACKED_KINDS[change.__name__] = frozenset(kinds)
        MIXED_MUTANTS.update({change.__name__} if mixed else ())
        return _adds_to(PACKED_MUTANTS)(change)

    return add
