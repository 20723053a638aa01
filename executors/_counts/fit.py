"""Counts of a large layer from those of small ones.

At a fixed number of rows for each expert, what a product or an elementwise kernel does is a sum: so much for the
launch, for each program that takes several tiles, for each expert, and for each row, column and step of an expert's
matrices. So a count is a sum of terms in E, H and I and the multiprocessors that programs are made for, as long as
sizes keep what is left when blocks divide them. As many small layers as there are terms give the large one's counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

import numpy as np

from moe_ref.conformance.ptx.counters import InstructionCounts, KernelCounts

FIELDS = ("warps", "requests", "sectors", "ideal_sectors", "bytes", "wavefronts", "ideal_wavefronts", "shared_bytes")
EXPERTS, HIDDEN, INTERMEDIATE, MULTIPROCESSORS = range(4)
TERMS: tuple[tuple[int, ...], ...] = (
    (),
    (EXPERTS,),
    (EXPERTS, HIDDEN),
    (EXPERTS, INTERMEDIATE),
    (EXPERTS, HIDDEN, INTERMEDIATE),
    (MULTIPROCESSORS,),
)

Counts = dict[str, KernelCounts]  # by label of the kernel


class Sizes(NamedTuple):
    """Sizes of a layer or of a slice of one: E, H, I, and multiprocessors."""

    experts: int
    hidden: int
    intermediate: int
    multiprocessors: int


class Axes(NamedTuple):
    """What is executed of each of the `Sizes`: two values, or the layer's own alone."""

    experts: tuple[int, ...]
    hidden: tuple[int, ...]
    intermediate: tuple[int, ...]
    multiprocessors: tuple[int, ...]

    def terms(self) -> list[tuple[int, ...]]:
        """Of `TERMS` what is left where a size has one value: each once."""
        return list(dict.fromkeys(tuple(axis for axis in term if len(self[axis]) > 1) for term in TERMS))

    def points(self) -> list[Sizes]:
        """The slices, one for each of the terms."""
        return [self._at([axis for axis in term if axis != EXPERTS or term == (EXPERTS,)]) for term in self.terms()]

    def beyond(self) -> Sizes:
        """A slice that is none of those, to see whether the terms suffice: with a third H, or I if H is the layer's.

        In one product H is a number of columns and in another a number of steps, and so is I.
        """
        larger = INTERMEDIATE if len(self.hidden) == 1 else HIDDEN
        own = self._at([])
        values = self[larger]
        return Sizes(*(2 * values[-1] - values[0] if axis == larger else size for axis, size in enumerate(own)))

    def _at(self, second: list[int]) -> Sizes:
        return Sizes(*(values[axis in second] for axis, values in enumerate(self)))


def extrapolated(found: Sequence[Counts], axes: Axes, to: Sizes) -> Counts:
    """The counts of a layer of other sizes.

    Args:
        found: the counts of each of the slices at ``axes.points()``.
        axes: the slices.
        to: sizes of the layer.

    Raises:
        RuntimeError: kernels of slices differ, so that nothing follows from them; the message names one.
    """
    weights = _weights(axes, to)
    labels = list(found[0])
    out = {}
    for label in labels:
        own = [counts.get(label) for counts in found]
        texts = {tuple((i.line, i.name) for i in counts.instructions) for counts in own if counts is not None}
        if None in own or len(texts) != 1 or any(list(counts) != labels for counts in found):
            raise RuntimeError(f"{label}: must be compiled to the same text in all slices")
        out[label] = _sum([counts for counts in own if counts is not None], weights)
    return out


def _weights(axes: Axes, to: Sizes) -> np.ndarray:
    """What each slice counts for."""
    terms = axes.terms()

    def row(sizes: Sizes) -> list[float]:
        return [prod(sizes[axis] / axes[axis][0] for axis in term) for term in terms]

    matrix = np.array([row(point) for point in axes.points()], np.float64)
    return np.linalg.solve(matrix.T, np.array(row(to), np.float64))


def _sum(found: list[KernelCounts], weights: np.ndarray) -> KernelCounts:
    def weighted(numbers: list[np.ndarray]) -> np.ndarray:
        return np.rint(np.tensordot(weights, np.array(numbers, np.float64), 1)).astype(np.int64)

    table = weighted([np.array([[getattr(i, f) for f in FIELDS] for i in own.instructions]) for own in found])
    whole = weighted([np.array([own.programs, own.read, own.written]) for own in found])
    instructions = tuple(
        _with(own, dict(zip(FIELDS, map(int, row), strict=True)))
        for own, row in zip(found[0].instructions, table, strict=True)
    )
    programs, read, written = map(int, whole)
    return replace(found[0], instructions=instructions, programs=programs, read=read, written=written)


def added(a: KernelCounts, b: KernelCounts) -> KernelCounts:
    """Two launches of one kernel as one; what both read or write counts twice."""
    return replace(
        a,
        programs=a.programs + b.programs,
        read=a.read + b.read,
        written=a.written + b.written,
        instructions=tuple(
            _with(own, {name: getattr(own, name) + getattr(other, name) for name in FIELDS})
            for own, other in zip(a.instructions, b.instructions, strict=True)
        ),
    )


def times(own: KernelCounts, by: Fraction) -> KernelCounts:
    """So many launches of a kernel as one."""
    return replace(
        own,
        programs=round(by * own.programs),
        read=round(by * own.read),
        written=round(by * own.written),
        instructions=tuple(_with(i, {name: round(by * getattr(i, name)) for name in FIELDS}) for i in own.instructions),
    )


def _with(own: InstructionCounts, numbers: dict[str, Any]) -> InstructionCounts:
    return replace(own, **numbers)


def differences(a: Counts, b: Counts) -> dict[str, float]:
    """By field, the largest relative difference of a kernel's sum, of two counts of one layer; without those of 0."""
    out: dict[str, float] = {}
    for label, own in a.items():
        pairs = {name: (own.total(name), b[label].total(name)) for name in FIELDS}
        pairs |= {name: (getattr(own, name), getattr(b[label], name)) for name in ("programs", "read", "written")}
        for name, (x, y) in pairs.items():
            if x != y:
                out[name] = max(out.get(name, 0.0), abs(x - y) / max(x, y))
    return out
