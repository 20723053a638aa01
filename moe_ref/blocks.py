"""The rows of each expert: a block of their own, or all rows under a mask where no group's size is known (E3).

A library that traces knows shapes and no values: under ``jax.jit`` and ``jax.vmap`` group sizes cannot decide the shape
of a block. There every expert gets all rows, with zeros in place of those that are not its own. The results are the
same, at E times the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Bool, Float, Int


@dataclass(frozen=True, eq=False)
class Block:
    """The rows of one expert, among S rows in expert order.

    Attributes:
        index: of the expert.
        rows: where its rows are; or, where sizes are not known, whether each row is its own.
    """

    index: int
    rows: slice | Bool[Array, " S"]

    def take(self, rows: Float[Array, "*#samples S N"]) -> Float[Array, "*#samples n N"]:
        """Its rows; with a mask all rows, those of others as zeros."""
        if isinstance(self.rows, slice):
            return rows[..., self.rows, :]
        xp = array_namespace(rows)
        return xp.where(self.rows[:, None], rows, xp.zeros_like(rows))

    def gradient(self, value: Array) -> Array:
        """A parameter's gradient: exactly 0 of an expert without rows (D2), also where its parameters are NaN."""
        if isinstance(self.rows, slice):
            return value
        xp = array_namespace(value)
        return xp.where(xp.any(self.rows), value, xp.zeros_like(value))


def blocks_of(group_offsets: Int[Array, " E+1"], count: int) -> list[Block]:
    """A block for each expert that has some of the ``count`` rows; for each expert, where sizes are not known."""
    edges = [group_offsets[index] for index in range(group_offsets.shape[0])]
    try:
        known = [int(edge) for edge in edges]
    except TypeError:  # jax.errors.ConcretizationTypeError is one
        xp = array_namespace(group_offsets)
        places = xp.arange(count, device=device(group_offsets))
        return [Block(e, (edges[e] <= places) & (places < edges[e + 1])) for e in range(len(edges) - 1)]
    pairs = enumerate(pairwise(known))
    return [Block(index, slice(start, stop)) for index, (start, stop) in pairs if start < stop]


def joined(
    blocks: Sequence[Block], outputs: Sequence[Array], rows: Float[Array, "*#samples S N"]
) -> Float[Array, "*#samples S N"]:
    """What the blocks of ``rows`` became, [..., n, N] each, in their order; and zeros for the rows of no block."""
    xp = array_namespace(rows)
    masks = [block.rows for block in blocks if not isinstance(block.rows, slice)]
    if masks:
        total = xp.zeros_like(outputs[0])
        for mask, output in zip(masks, outputs, strict=True):
            total = xp.where(mask[:, None], output, total)
        return total
    outside = rows.shape[-2] - sum(output.shape[-2] for output in outputs)
    samples = (outputs[0] if outputs else rows).shape[:-2]
    zeros = xp.zeros((*samples, outside, rows.shape[-1]), dtype=xp.float64, device=device(rows))
    return xp.concat([*outputs, zeros], axis=-2)
