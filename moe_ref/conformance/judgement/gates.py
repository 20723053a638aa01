"""The three gates that tell whether a result lies within its error bars (docs/tolerance.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moe_ref.types import PER_EXPERT

MAX_Z = 6.0  # every element
RMS_Z = 1.0  # root mean square, or RMS_SDS of its own standard deviations
RMS_SDS = 6.0
RMS_FROM = 4096  # elements from which the rms gate applies
GAIN_SDS = 6.0  # gain <error, y> / <y, y>, in its own standard deviations


CLAUSES = {  # of an output or a gradient; where inputs in fp16 have powers, so that its range is passed, E7
    "y": "C1, E1, E2",
    "x": "D1",
    "router_logits": "D1, R5",
    "topk_weights": "D3, R7",
    **dict.fromkeys(PER_EXPERT, "D1, D2"),
    "expert_scale": "D1, D2, R9",
    "post_expert_norm": "D1, E8",
}


class Bars(Protocol):
    """An exact value with its error bars: `moe_ref.error_bars.TensorBars`, or those that a file holds."""

    @property
    def exact(self) -> np.ndarray:
        """The exact value, in float64."""

    def sd(self, dtype: str, out_dtype: str) -> np.ndarray:
        """Standard deviation of each element's error."""

    def gain_sd(self, dtype: str, out_dtype: str) -> float:
        """Standard deviation of the gain."""

    def rms_sd(self, dtype: str, out_dtype: str) -> float:
        """Standard deviation of the root mean square of z."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one output or gradient.

    Attributes:
        name: "y", or the input whose gradient it is.
        max_z, rms_z, gain_z: the gates' figures; 0 where nothing could be measured.
        failure: one line saying which gate failed and how, or "".
        zero: whether it failed at a number that nothing can reach, and that must be exactly 0.
    """

    name: str
    max_z: float = 0.0
    rms_z: float = 0.0
    gain_z: float = 0.0
    failure: str = ""
    zero: bool = False

    @property
    def clauses(self) -> str:
        """The clauses of which the failure breaks one: D2, on experts without tokens, is about zeros alone."""
        named = CLAUSES[self.name].split(", ")
        return ", ".join(clause for clause in named if clause != "D2" or self.zero)

    @property
    def severity(self) -> tuple[bool, float]:
        """Grows with the failure: y comes before gradients; what no gate measures, before numbers."""
        return self.name == "y", self.max_z or math.inf


def judge(
    name: str,
    actual: np.ndarray,
    bars: Bars,
    dtype: str,
    out_dtype: str,
    judged: np.ndarray | None = None,
) -> Verdict:
    """Puts one tensor through the gates.

    Args:
        name: for the message.
        actual: float64, the shape of ``bars.exact``.
        bars: exact value and error bars.
        dtype: x's dtype.
        out_dtype: the tensor's own dtype.
        judged: boolean, broadcastable from the left; other elements do not count (they may be NaN by R4).
    """
    if actual.shape != bars.exact.shape:
        return Verdict(name, failure=f"{name}.shape={actual.shape}, but must be {bars.exact.shape}")
    mask = np.ones(actual.shape, dtype=bool)
    if judged is not None:
        mask &= judged.reshape(judged.shape + (1,) * (actual.ndim - judged.ndim))
    where = _masks_differ(actual, bars.exact, mask)
    if where is not None:
        failure = f"{name}{where}={actual[where]:.9g}, but must be {bars.exact[where]:.9g}"
        unreached = bars.exact[where] == 0 and bars.sd(dtype, out_dtype)[where] == 0
        return Verdict(name, failure=failure, zero=bool(unreached))
    finite = np.isfinite(bars.exact)
    whole = bool((mask | ~finite).all())  # the gain's deviation is that of all elements
    mask &= finite
    sd = bars.sd(dtype, out_dtype)
    error = np.where(mask, actual - np.where(mask, bars.exact, 0.0), 0.0)
    wrong_zero = mask & (sd == 0) & (error != 0)
    if wrong_zero.any():
        where = _first(wrong_zero)
        failure = f"{name}{where}={actual[where]:.9g}, but must be exactly 0"
        return Verdict(name, max_z=math.inf, failure=failure, zero=bool(bars.exact[where] == 0))
    z = standardise(error, sd, mask)
    counted = int((mask & (sd > 0)).sum())
    max_z = float(np.abs(z).max(initial=0.0))
    rms_z = float(np.sqrt(np.sum(z**2) / counted)) if counted else 0.0
    y = np.where(mask, bars.exact, 0.0).ravel()
    gain_sd = bars.gain_sd(dtype, out_dtype)
    largest = float(np.abs(y).max(initial=0.0)) or 1.0
    y = y / largest
    gain_z = float(error.ravel() @ y / (y @ y) / largest / gain_sd) if whole and y.any() and gain_sd > 0 else 0.0
    limit = max(RMS_Z, RMS_SDS * bars.rms_sd(dtype, out_dtype)) if counted >= RMS_FROM and rms_z > RMS_Z else RMS_Z
    failure = ""
    if max_z > MAX_Z:
        where = _first(np.abs(z) == np.abs(z).max())
        right = f"{bars.exact[where]:.9g} +- {sd[where]:.2g}"
        failure = f"{name}{where}={actual[where]:.9g}, but must be {right}: max z {over(max_z, MAX_Z)}, limit {MAX_Z:g}"
    elif counted >= RMS_FROM and rms_z > limit:  # all elements together: none of them is at fault alone
        failure = f"{name}: rms z={over(rms_z, limit, 2)}, but must be at most {limit:.3g}, over {counted} elements"
    elif abs(gain_z) > GAIN_SDS:
        found = f"{gain_z * gain_sd:+.2e}, but must be 0 +- {gain_sd:.2g}"
        failure = f"{name}: gain={found}: gain z {over(abs(gain_z), GAIN_SDS)}, limit {GAIN_SDS:g}"
    return Verdict(name, max_z, rms_z, gain_z, failure)


def over(z: float, limit: float, digits: int = 1) -> str:
    """A z past its limit, in as many digits as show that it is; a large one with an exponent."""
    while digits < 9 and float(short(z, digits)) <= limit:
        digits += 1
    return short(z, digits)


def short(z: float, digits: int = 1) -> str:
    """A z for people: a large one in three digits and an exponent."""
    return f"{z:.{digits}f}" if abs(z) < 10_000 else f"{z:.3g}"


def standardise(error: np.ndarray, sd: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """z: errors in error bars; 0 outside the mask and where nothing can err."""
    where = sd > 0 if mask is None else mask & (sd > 0)
    return np.divide(error, sd, out=np.zeros_like(error), where=where)


def _masks_differ(actual: np.ndarray, exact: np.ndarray, mask: np.ndarray) -> tuple[int, ...] | None:
    """Where the first NaN or infinity is that must not be, or is not that must be; None where none is."""
    for test in (np.isnan, np.isinf):
        differ = mask & (test(actual) != test(exact))
        if differ.any():
            return _first(differ)
    return None


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])
