"""A model small enough to be trained in tests, of the bundled one's form, with biases that count."""

from functools import cache

import torch

from moe_ref import MoEConfig
from tiny.model import Model, Shape
from tiny.reference import Honest, specified
from tiny.training import Recipe, Run, train

GPT_OSS = MoEConfig(2, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
SHAPE = Shape(layers=2, hidden=32, intermediate=16, experts=4, heads=2, head_dim=16, window=8, layer=GPT_OSS)
RECIPE = Recipe(steps=3, learning_rate=1e-3, warmup_steps=2)
HONEST = 6


@cache
def model() -> Model:
    """Random, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Model(SHAPE).double()
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return made


@cache
def windows() -> torch.Tensor:
    """[2, 25] bytes."""
    return torch.randint(256, (2, 25), generator=torch.Generator().manual_seed(0))


@cache
def exact(dtype: str) -> Run:
    """The run that all others are held to."""
    return train(model(), windows(), specified(dtype), RECIPE)


@cache
def honest(dtype: str) -> tuple[Run, ...]:
    """Runs with every error that is allowed."""
    computes = (specified(dtype, Honest(dtype, number)) for number in range(HONEST))
    return tuple(train(model(), windows(), compute, RECIPE, exact(dtype).choices) for compute in computes)
