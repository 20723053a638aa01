"""A case: a name, the clauses it is about, a sentence, and what it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.contents import Decode, Quantize, Route
from moe_ref.conformance.vectors.layers import Layer, Refused
from moe_ref.types import MoEConfig

Content = Layer | Route | Decode | Quantize | Refused


@dataclass(frozen=True, eq=False)
class Case:
    """One vector.

    Attributes:
        name: of the case and of its files.
        clauses: of docs/spec.md that it is about; a layer says something about most others too.
        says: one sentence, for whoever sees it fail.
        content: what goes in and what comes out.
    """

    name: str
    clauses: tuple[str, ...]
    says: str
    content: Content


def layer(name: str, clauses: str, says: str, config: MoEConfig, sizes: str = "", **fields: Any) -> Case:
    """A layer whose numbers are drawn.

    Args:
        name: of the case.
        clauses: with blanks between them.
        says: one sentence.
        config: the layer's configuration.
        sizes: "T E H I".
        **fields: of `Problem`.
    """
    tokens, experts, hidden, inner = map(int, (sizes or "5 4 8 5").split())
    return Case(name, tuple(clauses.split()), says, Layer(Problem(tokens, experts, hidden, inner, config, **fields)))


def of(name: str, clauses: str, says: str, content: Content) -> Case:
    """A case of a content that is at hand."""
    return Case(name, tuple(clauses.split()), says, content)
