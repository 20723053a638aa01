"""Whether 4-bit weights are decoded in the products or before them: a rule by the mean rows of an expert.

A product decodes a number once for each row tile that uses it, in registers, and writes nothing. Decoding before the
product decodes each number once, but writes it and reads it again in 16 bits. So the first wins for few rows, and the
second for many.
"""

from __future__ import annotations

from typing import NamedTuple

FUSED, DECODED = "fused", "decoded"


class Rule(NamedTuple):
    """When a kind of device decodes in the products.

    Attributes:
        rows: up to so many mean rows of an expert, S / E.
        basis: where the number comes from.
    """

    rows: float
    basis: str


COUNTED = "counted, awaiting a measurement"  # by benchmarks/four_bit_counts.py; see docs/four-bit.md
RULES = {
    "sm75": Rule(32, COUNTED),
    "sm80": Rule(256, COUNTED),
    "sm86": Rule(896, COUNTED),
    "sm90": Rule(256, COUNTED),
    "sm100": Rule(128, COUNTED),
    "gfx942": Rule(128, COUNTED),
    "interpreter": Rule(6, "small, so that small problems take both ways"),
}


def path_of(family: str, rows: float) -> str:
    """The path of a call: "fused" or "decoded".

    Args:
        family: of the device.
        rows: mean rows of an expert, S / E.
    """
    return FUSED if rows <= RULES[family].rows else DECODED


def describe(family: str, rows: float | None) -> str:
    """Which path a call takes and why, in one line; without rows, the rule."""
    rule = RULES[family]
    bound = f"up to {rule.rows:g} rows per expert ({rule.basis})"
    if rows is None:
        return f"4 bits: decoded in the products {bound}"
    if path_of(family, rows) == FUSED:
        return f"4 bits: decoded in the products, as {bound}; here {rows:g}"
    return f"4 bits: decoded before the products; in them only {bound}; here {rows:g}"
