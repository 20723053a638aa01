"""Do the losses of an executor agree with the exact ones as far as error bars allow?

Three kinds of runs train the same model on the same bytes. The *exact* run computes the experts by the specification
in float64. *Honest* runs do the same with random errors of full size wherever clause E2 allows a rounding, each in its
own way: so the differences of their losses from the exact ones show how far rounding alone may carry training, with all
that the optimiser makes of it. Each executor has a run too, whose losses must not differ by more than `LIMIT` times
as much.

Choosing experts has no error bars: a token whose fourth and fifth logits nearly tie goes elsewhere after the smallest
change, and the loss jumps. So all runs are held to the exact run's choices, as error bars are everywhere in this
project; how many tokens would have chosen otherwise is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiny.training import Run

LIMIT = 6.0  # deviations, as in docs/tolerance.md
FEWEST = 6  # honest runs that make a band


@dataclass(frozen=True)
class Verdict:
    """How a run fared.

    Attributes:
        differences: from the exact losses, for each step.
        z: the same in deviations of honest runs.
        otherwise: choices of a token in a layer at a step that would have been others, and out of how many.
    """

    differences: list[float]
    z: list[float]
    otherwise: tuple[int, int]

    @property
    def worst(self) -> int:
        """The step (from 0) at which the run strays farthest."""
        return int(np.argmax(np.abs(self.z)))

    @property
    def agrees(self) -> bool:
        """Whether it stays within the band at every step."""
        return bool(np.all(np.abs(self.z) <= LIMIT))


def deviations(exact: Run, honest: Sequence[Run]) -> list[float]:
    """For each step, how far honest runs stray from the exact one.

    Root mean square over the runs, and at least half of that over the steps so far: where the runs happen to cross the
    exact one, a few of them say little.

    Raises:
        ValueError: there are too few runs.
    """
    if len(honest) < FEWEST:
        raise ValueError(f"{len(honest)} honest runs: must be at least {FEWEST}")
    squares = np.mean([np.square(_differences(run, exact)) for run in honest], axis=0)
    so_far = np.cumsum(squares) / np.arange(1, len(squares) + 1)
    return np.sqrt(np.maximum(squares, so_far / 4)).tolist()


def judge(run: Run, exact: Run, sd: Sequence[float]) -> Verdict:
    """Compares a run with the exact one; a loss that is not finite is infinitely far away."""
    differences = _differences(run, exact)
    z = np.where(np.isfinite(differences), differences / np.asarray(sd), np.inf)
    return Verdict(differences.tolist(), z.tolist(), otherwise(run, exact))


def otherwise(run: Run, exact: Run) -> tuple[int, int]:
    """How many choices of the run differ, and out of how many."""
    differing = sum(int((a != b).any(dim=1).sum()) for a, b in zip(run.choices, exact.choices, strict=True))
    return differing, sum(len(choice) for choice in exact.choices)


def _differences(run: Run, exact: Run) -> np.ndarray:
    return np.subtract(run.losses, exact.losses)
