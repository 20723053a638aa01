"""Every contender in turn, from the same adapters, on the same text."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from executors._compare.measure import in_a_process
from executors._compare.report import version_of
from qlora import contenders
from qlora.report import PACKAGES, Result
from qlora.setup import Setup, adapted, base_model, windows
from qlora.state import State
from qlora.training import fine_tune, recipe_of, trained

EXACT = "exact"  # the run in fp32
EXAMPLES = Path(__file__).parents[1]
Tell = Callable[[str, int], object]  # the contender, and its steps so far


@dataclass(frozen=True)
class Contest:
    """What is run.

    Attributes:
        setup: what decides the numbers.
        names: of contenders; the last one's adapters stay in the model.
        folder: where states are kept.
        save_every: steps between two of them.
        memory: whether peaks are measured, each in a process of its own.
        exact: whether the same is trained in fp32 too, to see how far rounding alone moves losses.
    """

    setup: Setup
    names: tuple[str, ...]
    folder: Path
    save_every: int
    memory: bool
    exact: bool = False

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of all runs, in order."""
        return (*([EXACT] if self.exact else []), *self.names)


def exact_losses(contest: Contest, tell: Tell) -> list[float] | None:
    """Of the same fine-tune in fp32, on an executor; None where it is not wanted."""
    if not contest.exact:
        return None
    setup = replace(contest.setup, dtype="float32")
    model = adapted(base_model(setup), setup)
    contenders.switch(model, "auto")
    return _run(contest, setup, model, EXACT, tell).losses


def hold(contest: Contest, model: nn.Module, tell: Tell) -> list[Result]:
    """Runs all of them. A run that was killed goes on from its last state.

    Args:
        contest: what is run.
        model: adapted; it ends with the adapters of the last contender.
        tell: called after each step.

    Raises:
        ValueError: a state on disk is of another run.
    """
    setup = contest.setup
    start = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    results = []
    for name in contest.names:
        with torch.no_grad():
            for key, parameter in trained(model).items():
                parameter.copy_(start[key])
        contenders.switch(model, name)
        state = _run(contest, setup, model, name, tell)
        peak, reason = _peak(setup, name) if contest.memory else (None, "not asked for")
        results.append(Result(name, state.losses, state.seconds, setup.tokens, peak, reason))
    return results


def _run(contest: Contest, setup: Setup, model: nn.Module, name: str, tell: Tell) -> State:
    return fine_tune(
        model,
        windows(setup),
        recipe_of(setup, contest.save_every),
        contest.folder / f"{name}.safetensors",
        run_of(setup, name),
        lambda step: tell(name, step),
    )


def run_of(setup: Setup, name: str) -> str:
    """All that a run's losses depend on."""
    versions = {package: version_of(package) for package in PACKAGES}
    machine = {"python": platform.python_version(), "threads": torch.get_num_threads()}  # the text is Python's own
    own: dict[str, Any] = setup.as_json() | {"experts": name} | machine | versions
    return json.dumps(own, sort_keys=True)


def _peak(setup: Setup, name: str) -> tuple[int | None, str]:
    return in_a_process("qlora.memory", json.dumps(setup.as_json()), name, folder=EXAMPLES)
