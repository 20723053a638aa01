"""Every contender in turn, from the same adapters, on the same text."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from executors._compare.measure import in_a_process
from executors._compare.report import version_of
from qlora import contenders
from qlora.report import PACKAGES, Result
from qlora.setup import Setup, windows
from qlora.training import fine_tune, recipe_of, trained

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
    """

    setup: Setup
    names: tuple[str, ...]
    folder: Path
    save_every: int
    memory: bool


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
    text = windows(setup)
    start = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    results = []
    for name in contest.names:
        with torch.no_grad():
            for key, parameter in trained(model).items():
                parameter.copy_(start[key])
        contenders.switch(model, name)
        state = fine_tune(
            model,
            text,
            recipe_of(setup, contest.save_every),
            contest.folder / f"{name}.safetensors",
            run_of(setup, name),
            lambda step, name=name: tell(name, step),  # type: ignore[misc]
        )
        peak, reason = _peak(setup, name) if contest.memory else (None, "not asked for")
        results.append(Result(name, state.losses, state.seconds, setup.tokens, peak, reason))
    return results


def run_of(setup: Setup, name: str) -> str:
    """All that a run's losses depend on."""
    own: dict[str, Any] = setup.as_json() | {"experts": name, "threads": torch.get_num_threads()}
    own |= {"python": platform.python_version()} | {
        package: version_of(package) for package in PACKAGES
    }  # and its text
    return json.dumps(own, sort_keys=True)


def _peak(setup: Setup, name: str) -> tuple[int | None, str]:
    return in_a_process("qlora.memory", json.dumps(setup.as_json()), name, folder=EXAMPLES)
