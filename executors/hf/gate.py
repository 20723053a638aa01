"""Finds which activation a gate computes, by its values alone.

A gate is h(g, u) = (clamp(u, -L, L) + o) a(min(g, L)), or its clamp comes after a. It is a straight line in u between
the clamps, so L, o and a(g) follow from a few of its values; alpha follows from a(g) = g sigmoid(alpha g). With
softcaps it is h(g, u) = (cap(u) + o) cap(g) sigmoid(alpha g): the caps follow from values far out, then alpha and o.

What is found so is a guess: the guess counts if it agrees with the gate on a grid that reaches far past clamps and
caps. A clamp of more than 13 / alpha is the same before the activation and after it, as far as fp32 tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from executors._base.arguments import Activation
from executors._pipeline import activation

NEAR = 2e-6  # of the largest value around: gates that compute in fp32 are told apart from each other, and no better
FAR = 1e30  # past every clamp; some gates cast to fp32
DIGITS = (1, 2, 3, 4, 5, 6, 7, 9, 12)
GATED, PLAIN = ("swiglu", "geglu", "geglu_tanh"), ("silu", "gelu", "gelu_tanh", "relu2")

PROBED = (0.5, 0.0625)  # gates below the clamp, if one of them is
OUTSIDE = torch.tensor([-1e4, -300.0, 300.0, 1e4, 1e5, -1e5], dtype=torch.float64)  # where any clamp shows
UPS = tuple(2.0**exponent for exponent in range(-10, 11))

Apply = Callable[[Tensor], Tensor]
At = Callable[[float, float], float]


def gate_of(apply: Apply) -> Activation | None:
    """The activation that a gate computes, or None where there is none of that kind.

    Args:
        apply: h [n, I] from z [n, 2I], on the CPU, of any I, in float64 or narrower.
    """
    layout = _layout(apply)
    if not layout:
        return None

    def of_pairs(gate: Tensor, up: Tensor) -> Tensor:
        return apply(torch.stack([gate, up], dim=-1))[:, 0].double()

    return next((guess for guess in _guesses(of_pairs, layout) if _agrees(apply, guess, 2)), None)


def plain_of(apply: Apply) -> Activation | None:
    """The activation h = act(z) that a function computes, or None.

    Args:
        apply: h [n, I] from z [n, I].
    """
    guesses = (Activation(name, 1.0, None, 0.0, "") for name in PLAIN)
    return next((guess for guess in guesses if _agrees(apply, guess, 1)), None)


def _layout(apply: Apply) -> str:
    """Which results follow the third number of four: in rows (g0, g1, u0, u1) the first, in (g0, u0, g1, u1) the last.

    "" where it is neither.
    """
    z = torch.tensor([[0.5, 0.25, 0.75, 0.375]], dtype=torch.float64) / 16  # below every clamp
    moved = z.clone()
    moved[0, 2] *= 1.25
    changed = (apply(z) != apply(moved)).flatten().tolist()
    return {(True, False): "concatenated", (False, True): "interleaved"}.get(tuple(changed), "")


def _guesses(h: Callable[[Tensor, Tensor], Tensor], layout: str) -> Iterator[Activation]:
    """Activations that agree with the gate at a few points, each once."""

    def at(gate: float, up: float) -> float:
        return float(h(torch.tensor([gate], dtype=torch.float64), torch.tensor([up], dtype=torch.float64)))

    return iter(dict.fromkeys([*_softcapped(at, layout), *_clamped(at, layout)]))


def _softcapped(at: At, layout: str) -> Iterator[Activation]:
    """Gates with a cap of one half or of both; none where neither half is bounded."""
    for gate in PROBED:
        line, middle = partial(at, gate), at(gate, 0.0)
        half = (line(FAR) - line(-FAR)) / 2  # a(g) times the cap, if there is one
        up, size, up_softcap = 1.0, 1.0, None
        if _is_bounded(half, (line(FAR / 2) - line(-FAR / 2)) / 2):
            up = next((u for u in UPS if abs(line(u) - middle) > 0.4 * abs(half)), UPS[-1])
            share = (line(up) - middle) / half
            if not 0 < share < 1:
                continue
            up_softcap = up / math.atanh(share)
            size = up_softcap * share

        def a(g: float, up: float = up, size: float = size) -> float:
            return (at(g, up) - at(g, -up)) / 2 / size

        def capped(g: float, a: Callable[[float], float] = a) -> float:
            return a(g) - a(-g)  # as sigmoid(-v) is 1 - sigmoid(v), whatever alpha is

        bound = capped(FAR)
        gate_softcap = bound if _is_bounded(bound, capped(FAR / 2)) else None
        sigmoid = a(gate) / capped(gate) if capped(gate) else 0.0
        if (up_softcap is None and gate_softcap is None) or not 0 < sigmoid < 1:
            continue
        alpha, offset = math.log(sigmoid / (1 - sigmoid)) / gate, middle / a(gate)
        for digits in DIGITS:
            caps = [None if cap is None else _rounded(cap, digits) for cap in (gate_softcap, up_softcap)]
            yield Activation("swiglu", _rounded(alpha, digits), None, _rounded(offset, digits), layout, "before", *caps)


def _is_bounded(far: float, half_as_far: float) -> bool:
    return math.isfinite(far) and far == half_as_far != 0


def _clamped(at: At, layout: str) -> Iterator[Activation]:
    """Gates that are straight in u, between clamps if there are any."""
    for gate in PROBED:
        middle, above, below = at(gate, 0.0), at(gate, FAR), at(gate, -FAR)
        reach = _straight(partial(at, gate), middle)
        value = (at(gate, reach) - middle) / reach if reach else 0.0
        if not value or not math.isfinite(value):
            continue
        clamped = math.isfinite(above) and above == at(gate, FAR / 2)
        limit = (above - below) / 2 / value if clamped else None
        share = value / gate
        alpha = math.log(share / (1 - share)) / gate if 0 < share < 1 else 1.0
        for digits in DIGITS:
            offset = _rounded(middle / value, digits)
            cut = None if limit is None else _rounded(limit, digits)
            for clamp in ("before",) if cut is None else ("before", "after"):
                yield Activation("swiglu", _rounded(alpha, digits), cut, offset, layout, clamp)
        for name in GATED[1:]:
            yield Activation(name, 1.0, None, 0.0, layout)


def _straight(line: Callable[[float], float], start: float) -> float:
    """The largest power of two up to which the line rises from ``start`` in proportion; 0 where there is none."""
    for exponent in range(10, -11, -1):
        up = 2.0**exponent
        half = line(up / 2) - start
        if half and abs(line(up) - start - 2 * half) <= NEAR * abs(2 * half):
            return up
    return 0.0


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}") if abs(value) > NEAR else 0.0


def _agrees(apply: Apply, guess: Activation, halves: int) -> bool:
    """Whether the gate and the guess are equal on a grid, in rows of several numbers."""
    reach = max(4.0, *(2 * (size or 0.0) for size in (guess.limit, guess.gate_softcap, guess.up_softcap)))
    axis = torch.cat([torch.linspace(-reach, reach, 65), torch.tensor([-60.0, -1e-3, 1e-3, 60.0])]).double()
    for values in (axis, OUTSIDE):
        z = torch.cartesian_prod(*[values] * halves).reshape(-1, 3 * halves)  # rows of several: the layout counts
        with torch.no_grad():
            actual, expected = apply(z).double(), activation.forward(z, guess)
        size = 1 + z.abs().amax(1, keepdim=True) ** 2
        if actual.shape != expected.shape or not ((actual - expected).abs() <= NEAR * size).all():
            return False
    return True


def as_config(found: Activation) -> dict[str, Any]:
    """The fields of ``MoEConfig`` that say it."""
    fields = found._asdict()
    return fields | {"activation": fields.pop("name"), "gate_up_layout": fields.pop("layout") or "concatenated"}
