"""Measurements of the two ways of decoding, where each is faster, and the rule that loses least."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from executors._bench.layers import Shape
from executors._bench.measure import Spread, is_no_result, ratios, spread

FUSED, DECODED = "fused", "decoded"


@dataclass(eq=False)
class CrossoverPoint:
    """One number of rows per expert.

    Attributes:
        rows: mean rows of an expert, S / E.
        tokens: T.
        seconds: of each contender that was right, one for each round: "fused", "decoded", "torch", "bf16".
        reference: the contender that was timed twice in each round, or "".
        again: its second times.
        max_z: the largest error of each contender, in error bars.
        failure: what is wrong with one of the two ways, or "".
        reasons: why a contender was not timed.
        tflop, size: operations in 10^12, and the least bytes that a call must move.
    """

    rows: float
    tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    reference: str = ""
    again: list[float] = field(default_factory=list)
    max_z: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    tflop: float = 0.0
    size: int = 0

    def ratio(self, name: str = DECODED) -> Spread | None:
        """How many times as long as "fused" a contender takes, over the rounds."""
        if FUSED not in self.seconds or name not in self.seconds:
            return None
        return spread(ratios(self.seconds[name], self.seconds[FUSED]))

    def control(self) -> Spread | None:
        """A contender against itself."""
        return spread(ratios(self.seconds[self.reference], self.again)) if self.again else None

    @property
    def winner(self) -> str:
        """The faster way, or "" where the ratio lies within the noise of a contender against itself."""
        ratio, control = self.ratio(), self.control()
        if ratio is None or (control is not None and is_no_result(ratio, control)) or ratio.median == 1.0:
            return ""
        return FUSED if ratio.median > 1.0 else DECODED


@dataclass(eq=False)
class CrossoverCurve:
    """One layer, format and direction.

    Attributes:
        shape: the layer.
        weights: the format.
        direction: "forward" or "lora".
        bound: rows up to which the executor decodes in the products at present.
        points: by rows, ascending.
        complete: whether none was left out for want of time.
    """

    shape: Shape
    weights: str
    direction: str
    bound: float
    points: list[CrossoverPoint] = field(default_factory=list)
    complete: bool = False

    def crossover(self) -> tuple[float | None, float | None]:
        """The largest rows up to which "fused" wins, and the least from which it does not pay any more.

        Points without a result end neither. None: there are no such rows among those measured.
        """
        lost = min((point.rows for point in self.points if point.winner == DECODED), default=None)
        won = [p.rows for p in self.points if p.winner == FUSED and (lost is None or p.rows < lost)]
        return max(won, default=None), lost


@dataclass(frozen=True)
class Loss:
    """What a rule takes longer than the faster way, over all points.

    Attributes:
        mean: geometric mean of the times over those of the faster way, less 1.
        worst: the largest.
    """

    mean: float
    worst: float


def loss(curves: Sequence[CrossoverCurve], bound: float) -> Loss:
    """What is lost if calls of up to ``bound`` rows are fused, and the others decoded; no result costs nothing."""
    lost = []
    for point in _measured(curves):
        ratio = point.ratio()
        assert ratio is not None
        chosen = FUSED if point.rows <= bound else DECODED
        lost.append(abs(math.log(ratio.median)) if point.winner not in ("", chosen) else 0.0)
    return Loss(math.expm1(statistics.fmean(lost)), math.expm1(max(lost))) if lost else Loss(0.0, 0.0)


def best_bound(curves: Sequence[CrossoverCurve]) -> float | None:
    """The bound among the rows measured, or 0, that loses least; of equal ones the largest: fused takes no memory."""
    bounds = sorted({0.0, *(point.rows for point in _measured(curves))})
    if len(bounds) == 1:
        return None
    return min(bounds, key=lambda bound: (loss(curves, bound).mean, -bound))


def _measured(curves: Sequence[CrossoverCurve]) -> list[CrossoverPoint]:
    return [point for curve in curves for point in curve.points if point.ratio() is not None]
