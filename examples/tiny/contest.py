"""All the runs of one comparison, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from executors import Executor
from tiny.judgement import deviations, judge
from tiny.model import Model
from tiny.reference import Honest, specified
from tiny.report import Contender, Results
from tiny.training import Recipe, on_executor, train


@dataclass(frozen=True)
class Contest:
    """What is trained, how, and with how many honest runs.

    Attributes:
        model: where every run begins.
        windows: [B, T + 1] bytes.
        recipe: how to train.
        dtype: in which experts are computed, "float32" or "bfloat16".
        honest: how many honest runs there are.
        seed: of their errors.
    """

    model: Model
    windows: Tensor
    recipe: Recipe
    dtype: str
    honest: int
    seed: int = 0

    def runs(self, chosen: Mapping[str, Executor], wrong: Mapping[str, Executor]) -> int:
        """How many there are at the most: each executor may have two."""
        return 1 + self.honest + 2 * len(chosen) + len(wrong)


def hold(
    contest: Contest,
    chosen: Mapping[str, Executor],
    wrong: Mapping[str, Executor],
    progress: Callable[[str], object] = lambda name: None,
) -> Results:
    """Runs them.

    Args:
        contest: what they have in common.
        chosen: executors, by name.
        wrong: executors that are wrong on purpose, by name.
        progress: told the run's name after each step.
    """
    dtype = getattr(torch, contest.dtype)
    go = partial(train, contest.model, contest.windows, recipe=contest.recipe)
    exact = go(specified(contest.dtype), progress=lambda: progress("exact"))
    honest = [
        go(
            specified(contest.dtype, Honest(contest.dtype, number, contest.seed)),
            held_to=exact.choices,
            progress=lambda number=number: progress(f"honest {number + 1}"),  # type: ignore[misc]
        )
        for number in range(contest.honest)
    ]
    sd = deviations(exact, honest)
    contenders = []
    for name, executor in {**chosen, **wrong}.items():
        told = partial(progress, name)
        held = go(on_executor(executor, dtype), held_to=exact.choices, progress=told)
        verdict, free = judge(held, exact, sd), None
        if name in chosen:  # which would do the same again where it would have chosen the same
            free = go(on_executor(executor, dtype), progress=told) if verdict.otherwise[0] else held
        contenders.append(Contender(name, held, verdict, free, name in wrong, executor.capabilities.interpreted))
    return Results(exact, honest, sd, contenders)
