"""Small checkpoints made by hand: a folder with tensors and config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from executors import checkpoint
from moe_ref import MoEWeights

State = dict[str, Tensor]
T, E, H, I = 5, 4, 64, 64  # noqa: E741  (whole blocks of 4 bits)
MIXTRAL = {"model_type": "mixtral", "num_experts_per_tok": 2, "hidden_act": "silu"}
GPT_OSS = {"model_type": "gpt_oss", "num_experts_per_tok": 2, "swiglu_limit": 7.0, "dtype": "bfloat16"}
PREFIX = "model.layers.0.mlp."
SPARSE = "model.layers.0.block_sparse_moe."


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8).to(dtype)


def folder(path: Path, tensors: State, config: dict[str, Any], name: str = "model.safetensors") -> Path:
    """Writes tensors and config.json."""
    path.mkdir(exist_ok=True)
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path / name)
    (path / "config.json").write_text(json.dumps(config))
    return path


def mixtral(prefix: str = SPARSE, seed: int = 0, rows: int = I) -> State:
    """A layer with a tensor per projection and expert."""
    state = {f"{prefix}gate.weight": random(E, H, seed=seed)}
    for expert in range(E):
        for number, (name, shape) in enumerate({"w1": (rows, H), "w3": (rows, H), "w2": (H, rows)}.items()):
            state[f"{prefix}experts.{expert}.{name}.weight"] = random(*shape, seed=seed + 100 * expert + number + 1)
    return state


def merged(state: State, prefix: str = SPARSE) -> tuple[Tensor, Tensor]:
    """[E, 2I, H] and [E, H, I] of such a layer, put together in another way."""
    experts = [{n: state[f"{prefix}experts.{e}.{n}.weight"] for n in ("w1", "w2", "w3")} for e in range(E)]
    up = torch.stack([torch.cat([each["w1"], each["w3"]]) for each in experts])
    return up, torch.stack([each["w2"] for each in experts])


def gpt_oss(prefix: str = PREFIX, rows: int = I) -> State:
    """A layer in stacks (E, H, 2I) and (E, I, H), with biases."""
    return {
        f"{prefix}experts.gate_up_proj": random(E, H, 2 * rows, seed=1),
        f"{prefix}experts.down_proj": random(E, rows, H, seed=2),
        f"{prefix}experts.gate_up_proj_bias": random(E, 2 * rows, seed=3),
        f"{prefix}experts.down_proj_bias": random(E, H, seed=4),
        f"{prefix}router.weight": random(E, H, seed=5),
        f"{prefix}router.bias": random(E, seed=6),
    }


def same_layer(found: MoEWeights, state: State, prefix: str = PREFIX) -> None:
    """A layer of `gpt_oss` bit for bit."""
    assert torch.equal(found.gate_up_proj, state[f"{prefix}experts.gate_up_proj"].transpose(1, 2))
    assert torch.equal(found.down_proj, state[f"{prefix}experts.down_proj"].transpose(1, 2))
    assert torch.equal(found.gate_up_proj_bias, state[f"{prefix}experts.gate_up_proj_bias"])
    assert torch.equal(found.down_proj_bias, state[f"{prefix}experts.down_proj_bias"])


def refused(action: Callable[[], object]) -> str:
    """The message, which is one line."""
    with pytest.raises(checkpoint.BadCheckpoint) as caught:
        action()
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert "\n" not in message
    return message


def read(path: Path, family: str | None = None) -> None:
    """Opens a checkpoint, and reads its first layer and its router."""
    opened = checkpoint.open(path, family)
    opened.weights(opened.layers[0])
    opened.router(opened.layers[0])
