"""The bundled model: the layer that `executors compare` takes, and the rest of it from a second file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_ref.nf4
from executors import nf4
from executors._files.tensors import opened
from tiny.model import Model, Shape

DATA = Path(__file__).parents[2] / "data"
LAYER = DATA / "tiny_gpt_oss_layer.safetensors"
REST = DATA / "tiny_gpt_oss_rest.safetensors"
KEPT = "layers.1.mlp.experts."  # what the layer file holds
PROJECTIONS = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")


def bundled_model() -> Model:
    """The trained model, in float64. Its outer layers' experts were stored in 4 bits, all else in bf16.

    Raises:
        ValueError: a file is not there, or is none of theirs.
    """
    model = Model(Shape()).double()
    model.load_state_dict(state_dict())
    return model


def state_dict() -> dict[str, Tensor]:
    """Every parameter by its name in `Model`, in float64."""
    found = {KEPT + name: value for name, value in _tensors(LAYER).items() if name in PROJECTIONS + BIASES}
    packed = [f"model.layers.{number}.mlp.experts.{name}" for number in (0, 2) for name in PROJECTIONS]
    found |= {name: moe_ref.nf4.decode(nf4.load(REST, name)) for name in packed}
    dense = {name: value for name, value in _tensors(REST).items() if name not in packed}
    found |= {name: value for name, value in dense.items() if not name.startswith(tuple(f"{n}." for n in packed))}
    return {name.removeprefix("model."): _wide(value) for name, value in found.items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    with opened(path) as file:
        return {name: file.tensor(name) for name in file.names}


def _wide(value: Any) -> Tensor:
    return torch.as_tensor(value).double()
