"""Each executor that can be had here with each kind of weights that it takes, and layers that have all that it can."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import executors
from executors import Executor
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights
from packed_cases import Sliced

E, K, H, I, T = 4, 2, 32, 32, 6  # noqa: E741
OTHERS: dict[str, Any] = {"slices": Sliced}  # the way of grouped_nf4 on a GPU without Triton
NAMES = [*executors.available(), *OTHERS]
FOUR_BITS = {
    "nf4": lambda weights: executors.nf4.quantize(weights),
    "nested": lambda weights: executors.nf4.quantize(weights, nested=True),
    "fp4": lambda weights: executors.nf4.quantize(weights, "fp4"),
    "mxfp4": lambda weights: executors.mxfp4.quantize(weights),
    "mixed": lambda weights: replace(weights, down_proj=executors.nf4.quantize(weights).down_proj),
}


def made(name: str) -> Executor:
    return OTHERS[name]() if name in OTHERS else executors.get(name)


def takes(name: str, kind: str) -> bool:
    able = made(name).capabilities
    return able.mixed if kind == "mixed" else {"nested": "nf4"}.get(kind, kind) in able.weights


def cases(*kinds: str, nightly: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Every executor with each of these kinds that it takes; others run with the profile nightly."""
    found = [
        pytest.param(name, kind, id=f"{name}-{kind}", marks=[pytest.mark.nightly] if kind in nightly else [])
        for name in NAMES
        for kind in (*kinds, *nightly)
        if takes(name, kind) and (name != "auto" or kind == "dense" or kind in nightly)
    ]
    return pytest.mark.parametrize(("name", "kind"), found)


every = pytest.mark.parametrize("name", NAMES)


def kind_of(name: str) -> str:
    """A kind of weights that the executor takes."""
    return "dense" if takes(name, "dense") else "nf4"


def in_kind(weights: MoEWeights, kind: str) -> MoEWeights:
    return weights if kind == "dense" else FOUR_BITS[kind](weights)


def layer(name: str, kind: str, config: MoEConfig | None = None, dtype: torch.dtype = torch.float32) -> MoEWeights:
    """A layer with biases, adapters, a selection bias, learned scales, and a norm if the executor has it."""
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=drawn) / 4).to(dtype)

    weights = MoEWeights(
        normal(E, 2 * I, H),
        normal(E, H, I),
        normal(E, 2 * I),
        normal(E, H),
        selection_bias=normal(E),
        lora=ExpertLoRA(normal(E, 2, H), normal(E, 2 * I, 2), normal(E, 2, I), normal(E, H, 2)),
        config=config or MoEConfig(K, scoring="sigmoid", renormalize=True),
        expert_scale=normal(E).exp(),
        post_expert_norm=normal(H) if made(name).capabilities.post_expert_norm else None,
    )
    return in_kind(weights, kind)


def leaves_of(weights: MoEWeights) -> MoEWeights:
    """The layer with its parameters as leaves that learn."""
    own = {name: value.detach().clone().requires_grad_() for name, value in weights.parameters().items()}
    return weights.with_parameters(own)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """x and router_logits."""
    drawn = torch.Generator().manual_seed(1)
    leading = shape or (T,)
    x = torch.randn(*leading, H, generator=drawn).to(dtype)
    return x, torch.randn(*leading, E, generator=drawn)
