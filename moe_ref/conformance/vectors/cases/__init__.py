"""The cases, by what they are about; the nasty ones first. A test demands two of each clause of docs/spec.md."""

from __future__ import annotations

from functools import lru_cache

from moe_ref.conformance.vectors.cases import (
    decoding,
    dtypes,
    experts,
    four_bits,
    gradients,
    norms,
    quantizing,
    refused,
    routing,
    slots,
)
from moe_ref.conformance.vectors.cases.case import Case, Content

__all__ = ["Case", "Content", "every_case"]

ABOUT = (routing, slots, experts, norms, gradients, dtypes, decoding, quantizing, four_bits, refused)


@lru_cache(maxsize=1)
def every_case() -> dict[str, Case]:
    """All cases, by name."""
    found = [case for module in ABOUT for case in module.cases()]
    named = {case.name: case for case in found}
    assert len(named) == len(found), "two cases have one name"
    return named
