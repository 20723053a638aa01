"""Approximations (``.approx`` and ``.full``): rounded to nearest, or off by as much as the PTX ISA allows, drawn.

Bounds are those of PTX ISA 9.2, of the section "Floating Point Instructions: ..." of each instruction, and of "Half
Precision Floating Point Instructions: ..." for 16 bits. What their tables give for zeros, infinities and NaN is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_ref.conformance.ptx.bfloat16 import from_bf16, to_bf16


class Bound(NamedTuple):
    """By how much a result may be off: the greatest of these.

    Attributes:
        ulps: units in the last place of the result.
        relative: to the exact result.
        absolute: whatever the result.
        nearest: whether ulps are counted from the correctly rounded result, not from the exact one.
    """

    ulps: float = 0.0
    relative: float = 0.0
    absolute: float = 0.0
    nearest: bool = False


BOUNDS = {
    ("div", "f32"): Bound(ulps=2),
    ("rcp", "f32"): Bound(ulps=1),
    ("sqrt", "f32"): Bound(relative=2.0**-23),
    ("rsqrt", "f32"): Bound(relative=2.0**-22.9),
    ("ex2", "f32"): Bound(ulps=2, nearest=True),
    ("ex2", "f16"): Bound(relative=2.0**-9.9),
    ("ex2", "bf16"): Bound(relative=2.0**-7),
    ("lg2", "f32"): Bound(relative=2.0**-22, absolute=2.0**-22),  # absolute between 0.5 and 2, where it is the greater
    ("tanh", "f32"): Bound(relative=2.0**-11),
    ("tanh", "f16"): Bound(absolute=2.0**-10.987),
    ("tanh", "bf16"): Bound(absolute=2.0**-8),
    ("sin", "f32"): Bound(absolute=2.0**-20.5),  # up to 2 pi
    ("cos", "f32"): Bound(absolute=2.0**-20.5),
}
FAR = Bound(absolute=2.0**-14.7)  # of sin and cos, from there up to 100 pi; nothing is said of what is beyond
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "div": np.divide,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda value: 1 / np.sqrt(value),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


class Approximate:
    """Makes approximations.

    Equal operands of one operation give equal results, as on a device.

    Args:
        seed: of the errors; None for none.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __call__(self, name: str, kind: str, *operands: Any) -> Any:
        """The function's value for each thread.

        Args:
            name: of `FUNCTIONS`.
            kind: "f32", "f16" or "bf16"; numbers in bf16 are given, and returned, in fp32.
            operands: arrays.
        """
        exact = FUNCTIONS[name](*(operand.astype(np.float64) for operand in operands))
        nearest = _rounded(exact, kind)
        if self.seed is None:
            return nearest
        around, most = _allowed(name, kind, exact, nearest, operands[0])
        off = around + self._drawn(exact) * most
        if BOUNDS[name, kind].ulps:  # among the least numbers two units are more than the number
            off = np.where(off * around < 0, 0 * around, off)
        off = _rounded(off, kind)
        free = np.isfinite(nearest) & (operands[0] != 0) & np.isfinite(operands[-1])
        free = free & (np.abs(off.astype(np.float64) - around) <= most)
        return np.where(free, off, nearest)

    def _drawn(self, exact: Any) -> Any:
        """Numbers from -1 to 1 by a hash of numbers: the finaliser of splitmix64."""
        assert self.seed is not None
        mixed = np.asarray(exact).view(np.uint64) + np.uint64(2 * self.seed + 1)
        for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(factor)
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def fast_quotient(quotient: Any, a: Any, b: Any) -> Any:
    """``div.approx``: beyond 2^126 the reciprocal of b is 0."""
    large = (np.abs(b) > 2.0**126) & np.isfinite(b)
    times = np.where(np.isinf(a), np.float32(np.nan), np.float32(1))
    return np.where(large, np.copysign(np.float32(0), quotient) * times, quotient)


def _rounded(value: Any, kind: str) -> Any:
    """To nearest even; bf16 in fp32."""
    if kind == "bf16":
        return from_bf16(to_bf16(value.astype(np.float32)))
    return value.astype(np.float16 if kind == "f16" else np.float32)


def _allowed(name: str, kind: str, exact: Any, nearest: Any, operand: Any) -> tuple[Any, Any]:
    """Around which number a result may be, and how far off."""
    bound = BOUNDS[name, kind]
    absolute: Any = bound.absolute
    if name in ("sin", "cos"):
        absolute = np.where(np.abs(operand) <= 2 * np.pi, absolute, FAR.absolute)
    most = np.maximum(np.abs(exact) * bound.relative, absolute)
    if bound.ulps:
        most = bound.ulps * np.spacing(np.abs(nearest)).astype(np.float64)
    return (nearest.astype(np.float64) if bound.nearest else exact), most


HELPERS: dict[str, Any] = {"fast_quotient": fast_quotient}
