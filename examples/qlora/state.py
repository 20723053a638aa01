"""The state of a fine-tune on disk: one file, replaced whole after each step that is saved, so that no kill harms it.

It holds the adapters, the optimiser's two moments for each of them, and in its metadata which run it belongs to and the
losses so far. Losses are written as hexadecimal numbers: a resumed run must repeat them to the last bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from executors._files.tensors import opened, write
from executors._files.text import one_line, parse_json

FORMAT = "moe-ref qlora state 1"
PARTS = ("parameter", "exp_avg", "exp_avg_sq")


@dataclass
class State:
    """How far a run has come.

    Attributes:
        losses: before each step taken.
        seconds: of each step taken.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)


def save_state(
    path: Path, run: str, state: State, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """Replaces the file.

    Args:
        path: of the file.
        run: all that the losses depend on; a file of another run is refused.
        state: so far.
        parameters: that are trained, by name.
        optimiser: AdamW over them.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        kept = optimiser.state[parameter]
        tensors |= {f"parameter.{name}": parameter.detach()}
        tensors |= {f"{part}.{name}": kept[part] for part in PARTS[1:] if part in kept}
    described = {
        "format": FORMAT,
        "run": run,
        "losses": json.dumps([loss.hex() for loss in state.losses]),
        "seconds": json.dumps(state.seconds),
    }
    write(path, tensors, described)


def load_state(
    path: Path, run: str, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> State | None:
    """Reads the file into parameters and optimiser; None where there is no file.

    Raises:
        ValueError: it is no such file, or one of another run.
    """
    if not path.exists():
        return None
    with opened(path) as file:
        described, tensors = file.metadata, {name: file.tensor(name) for name in file.names}
    if described.get("format") != FORMAT:
        raise ValueError(f"{path}: format={described.get('format')!r:.60}: must be {FORMAT!r}")
    if described.get("run") != run:
        own = one_line(described.get("run"))
        raise ValueError(f"{path}: is of another run: {own}; remove it, or choose another --output")
    try:
        losses = [float.fromhex(loss) for loss in parse_json(described["losses"])]
        seconds = [float(each) for each in parse_json(described["seconds"])]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: losses and seconds must be lists of numbers: {one_line(error)}") from error
    for name, parameter in parameters.items():
        for key in (f"{part}.{name}" for part in PARTS):
            if key not in tensors or tensors[key].shape != parameter.shape:
                raise ValueError(f"{path}: {key} must be there, of shape {tuple(parameter.shape)}")
    for name, parameter in parameters.items():
        kept = {part: tensors.pop(f"{part}.{name}").to(parameter.device) for part in PARTS}
        with torch.no_grad():
            parameter.copy_(kept.pop("parameter"))
        optimiser.state[parameter] = {"step": torch.tensor(float(len(losses))), **kept}
    return State(losses, seconds)
