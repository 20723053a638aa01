"""Peak memory of one contender's step: ``python -m qlora.memory SETUP NAME``, a process for each of them."""

from __future__ import annotations

import json
import sys

import torch

from executors._compare.memory import peak_of
from qlora import contenders
from qlora.setup import Setup, adapted, base_model, windows
from qlora.training import Recipe, one_step, recipe_of, trained


def main(setup_json: str, name: str) -> None:
    """Prints the bytes that a step takes at most, above the model with its optimiser, as the last line."""
    setup = Setup.from_json(json.loads(setup_json))
    text = windows(setup)
    model = adapted(base_model(setup), setup)
    contenders.switch(model, name)
    recipe: Recipe = recipe_of(setup)
    optimiser = torch.optim.AdamW(trained(model).values())

    def step() -> None:
        one_step(model, text[0], optimiser, recipe, 0)

    print(json.dumps(peak_of(step, lambda: None, setup.device)))


if __name__ == "__main__":
    main(*sys.argv[1:])
