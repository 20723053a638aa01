"""Number formats and rounding policies.

The specification's functions take a ``rounding`` policy and call it wherever an implementation may round (clause E2).
So one code path gives the exact answer, the low-precision twin, and the error bars:

- `Exact` returns every value as it is;
- `Nearest` rounds to nearest even: the low-precision twin of an honest implementation;
- `Perturbed` adds random errors of unit size: the samples behind the error bars (`moe_ref.error_bars`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from array_api_compat import array_namespace, device

from moe_ref._typing import Array
from moe_ref.noise import keys_of, uniform_of


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Attributes:
        name: the dtype's name, as NumPy and torch spell it.
        precision: significant bits, the hidden one counted.
        min_exponent: exponent e of the smallest normal number 2**e.
        max_exponent: exponent e of the largest power of two.
    """

    name: str
    precision: int
    min_exponent: int
    max_exponent: int

    @property
    def unit_roundoff(self) -> float:
        """u, half the distance from 1 to the next number: the largest relative error of rounding to nearest."""
        return 2.0**-self.precision

    @property
    def smallest_normal(self) -> float:
        """Below this number the spacing is constant, and rounding errs by up to u * smallest_normal."""
        return 2.0**self.min_exponent

    @property
    def max(self) -> float:
        """The largest finite number."""
        return 2.0**self.max_exponent * (2 - 2.0 ** (1 - self.precision))


FORMATS = {
    f.name: f
    for f in (
        Format("float64", 53, -1022, 1023),
        Format("float32", 24, -126, 127),
        Format("bfloat16", 8, -126, 127),
        Format("float16", 11, -14, 15),
    )
}


def accumulator(dtype: str) -> Format:
    """The least precise format in which sums of products of ``dtype`` accumulate (E2): fp32, or fp64 for fp64."""
    return FORMATS["float64" if dtype == "float64" else "float32"]


def round_to_nearest(value: Array, dtype: str, overflows: bool = True) -> Array:
    """Rounds float64 to the nearest number of another format, ties to even. The result is float64.

    Args:
        value: float64 array of any shape.
        dtype: "float64", "float32", "bfloat16" or "float16".
        overflows: whether numbers past the format's range become infinite; if not, they keep the format's precision.
    """
    fmt = FORMATS[dtype]
    if dtype == "float64":
        return value
    xp = array_namespace(value)
    finite = xp.isfinite(value)
    safe = xp.where(finite, value, xp.zeros_like(value))
    _, exponent = xp.frexp(safe)  # safe = m * 2**exponent with 0.5 <= |m| < 1
    exponent = xp.clip(exponent, min=fmt.min_exponent + 1)
    spacing = exponent - fmt.precision
    rounded = xp.ldexp(xp.round(xp.ldexp(safe, -spacing)), spacing)
    if overflows:
        infinite = xp.where(safe < 0, xp.full_like(safe, -math.inf), xp.full_like(safe, math.inf))
        rounded = xp.where(xp.abs(rounded) > fmt.max, infinite, rounded)
    return xp.where(finite, rounded, value)


@runtime_checkable
class Rounding(Protocol):
    """The policy that the specification calls wherever an implementation may round."""

    def store(self, site: str, value: Array) -> Array:
        """A value that may be rounded to x's dtype, at one of the sites of clause E2."""

    def accumulate(self, site: str, value: Array, sd: Callable[[], Array]) -> Array:
        """A value computed in the accumulator's precision, whose error there has deviation u * ``sd()``."""


class Exact:
    """No rounding: the specification in float64."""

    def store(self, site: str, value: Array) -> Array:
        """Returns ``value``."""
        return value

    def accumulate(self, site: str, value: Array, sd: Callable[[], Array]) -> Array:
        """Returns ``value``."""
        return value


EXACT = Exact()


@dataclass(frozen=True)
class Nearest:
    """Rounds to nearest even: at storage sites to ``dtype``, at sums to its accumulator (`accumulator`).

    Attributes:
        dtype: x's dtype.
        overflows: the storage sites at which numbers past the range of ``dtype`` become infinite; None for all.
    """

    dtype: str
    overflows: frozenset[str] | None = None

    def store(self, site: str, value: Array) -> Array:
        """Rounds to ``dtype``."""
        return round_to_nearest(value, self.dtype, self.overflows is None or site in self.overflows)

    def accumulate(self, site: str, value: Array, sd: Callable[[], Array]) -> Array:
        """Rounds to the accumulator's format."""
        return round_to_nearest(value, accumulator(self.dtype).name)


@dataclass(frozen=True)
class Perturbed:
    """Adds pseudo-random errors at one kind of site, in units of ``scale``.

    Rounding is deterministic: equal values have equal errors, and v, -v and 2v have the same relative error. So in
    every even sample the error is a hash of the value's mantissa, the site and the sample. Where many tokens are equal,
    errors add up. But an implementation may also add equal sums in different orders, by their position in a tile. So in
    every odd sample the error also depends on the element's position, and equal values err independently. An
    implementation may do either.

    Every array carries a leading axis of samples, so that all samples are computed at once. Its length is 1 until the
    first error reaches the array, and ``samples`` from there on.

    Attributes:
        kind: "storage" (errors uniform in +-max(|v|, floor)) or "accumulation" (errors of deviation ``sd()``).
        samples: length of the leading axis.
        seed: the seed of all samples.
        first: number of the first sample.
        floor: the storage format's smallest normal number, below which its errors are absolute.
        scale: size of the errors; small, so that the answer depends on them linearly.
    """

    kind: str
    samples: int
    seed: int = 0
    first: int = 0
    floor: float = 0.0
    scale: float = 2.0**-20

    def store(self, site: str, value: Array) -> Array:
        """Adds uniform errors of up to ``scale`` * max(|value|, floor)."""
        if self.kind != "storage":
            return value
        given = self._given(value)
        errors = self._noise(site, given, self.scale)
        errors *= _at_least(self.floor, given)
        errors += given
        return _like(value, errors)

    def accumulate(self, site: str, value: Array, sd: Callable[[], Array]) -> Array:
        """Adds uniform errors of deviation ``scale`` * ``sd()``."""
        if self.kind != "accumulation":
            return value
        given = self._given(value)
        errors = self._noise(site, given, math.sqrt(3.0) * self.scale)
        errors *= np.asarray(sd())
        errors += given
        return _like(value, errors)

    def _given(self, value: Array) -> np.ndarray:
        try:
            return np.asarray(value)
        except TypeError as error:  # jax.errors.TracerArrayConversionError is one
            allowed = "must be Exact or Nearest under jax.jit, where values are not known"
            raise TypeError(f"rounding={self}: {allowed}") from error

    def _noise(self, site: str, value: np.ndarray, size: float) -> np.ndarray:
        odd = np.arange(self.first, self.first + self.samples) % 2 == 1
        return uniform_of(value, keys_of(self.seed, site, self.first, self.samples), odd, size)


def _at_least(floor: float, value: np.ndarray) -> np.ndarray:
    """The value itself, or +-``floor`` where it is smaller."""
    if np.min(np.abs(value), initial=math.inf) >= floor:  # the usual case, and much faster
        return value
    return np.copysign(np.maximum(np.abs(value), floor), value)


def _like(given: Array, value: np.ndarray) -> Array:
    """Converts a NumPy array to the namespace and device of ``given``."""
    return value if isinstance(given, np.ndarray) else array_namespace(given).asarray(value, device=device(given))


def matmul_transposed(rounding: Rounding, site: str, a: Array, b: Array) -> Array:
    """Matrices a [..., m, k] times b [..., n, k] transposed, with the error of a sum of k products."""
    xp = array_namespace(a, b)
    product = xp.matmul(a, xp.matrix_transpose(b))
    length = a.shape[-1]
    return rounding.accumulate(
        site, product, lambda: sum_sd(product, xp.matmul(a * a, xp.matrix_transpose(b * b)), length)
    )


def sum_last(rounding: Rounding, site: str, terms: Array) -> Array:
    """Sum over the last axis, in increasing order, with the error of a sum of that many terms."""
    xp = array_namespace(terms)
    length = terms.shape[-1]
    total = xp.zeros_like(terms[..., 0])
    for k in range(length):
        total = total + terms[..., k]
    return rounding.accumulate(site, total, lambda: sum_sd(total, xp.sum(terms * terms, axis=-1), length))


def sum_sd(total: Array, squares: Array, length: int) -> Array:
    """Deviation, for u = 1, of a sum of n terms t in some order, each of its partial sums s rounded.

    Each rounding has variance s**2 / 3, so the variance of the sum is a third of all s**2. With terms of random signs
    the partial sums are a random walk, and their s**2 add up to (n / 2) sum(t**2). With terms of one sign they climb to
    the total S, and their s**2 add up to (n / 3) S**2. The sum of both covers the cases between, and orders in which
    the partial sums stray farther than on average.

    Args:
        total: S.
        squares: sum(t**2), of S's shape.
        length: n.
    """
    return array_namespace(total).sqrt(length / 9.0 * total * total + length / 6.0 * squares)
