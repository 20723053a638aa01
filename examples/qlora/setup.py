"""What is fine-tuned: a base model in 4 bits with adapters, made the same in every process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from executors import Unsupported, hf
from moe_ref.types import MoEConfig
from qlora import models, text
from qlora.models import BUNDLED, DEFAULT, RANDOM, Text
from tiny.model import Shape

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Setup:
    """All that decides which numbers come out.

    Attributes:
        model: "bundled", "random", or a folder.
        shape: of a random model.
        steps, windows, context: optimiser steps, windows of text in each, tokens in a window.
        rank: of the adapters; their lora_alpha is twice that.
        learning_rate: after a warm-up of 5 steps.
        accumulate: parts into which a step is cut.
        checkpointing: "none", or how activations are built anew in the backward pass: "reentrant", "non-reentrant".
        device: where all of it is.
        seed: of random parameters and adapters.
        dtype: of all that is not in 4 bits: "bfloat16", or "float32" for a run that rounding hardly touches.
    """

    model: str = BUNDLED
    shape: Shape = DEFAULT
    steps: int = 20
    windows: int = 4
    context: int = 256
    rank: int = 8
    learning_rate: float = 2e-3
    accumulate: int = 1
    checkpointing: str = "none"
    device: str = "cpu"
    seed: int = 0
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.windows * self.context

    def as_json(self) -> dict[str, Any]:
        """For programs, and for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Setup:
        """The same again."""
        shape = values["shape"] | {"layer": MoEConfig(**values["shape"]["layer"])}
        return cls(**values | {"shape": Shape(**shape)})


def base_model(setup: Setup, progress: Any = None) -> Any:
    """The model, its experts in NF4.

    Raises:
        ValueError, OSError: the folder has no such model.
    """
    if setup.model not in (BUNDLED, RANDOM):
        return _loaded(setup, progress)
    if setup.model == RANDOM:
        return _random(setup, progress).to(setup.device)
    model: Any = models.bundled_model()
    if setup.dtype == "float32":  # of the same numbers, and so of the same 4 bits
        model = model.float()
    hf.quantize_experts(model, progress=progress)
    return model.to(setup.device)


def _random(setup: Setup, progress: Any) -> Any:
    """Packed layer by layer: one of them is there in 16 bits."""
    layers, done = setup.shape.layers, 0

    def pack(layer: Any) -> None:
        nonlocal done
        if setup.dtype == "float32":
            layer.float()
        hf.quantize_experts(layer, progress=_part_of(progress, done, layers))
        done += 1

    model: Any = models.random_model(setup.shape, setup.seed, each=pack)
    return model.float() if setup.dtype == "float32" else model


def _part_of(progress: Any, before: int, parts: int) -> Any:
    """Progress of one of several parts of one size."""
    return progress and (lambda done, total: progress(before * total + done, parts * total))


def _loaded(setup: Setup, progress: Any) -> Any:
    """From a folder; experts that are in 4 bits already stay what they are."""
    try:
        return hf.load_quantized(setup.model, progress=progress, device=setup.device)
    except Unsupported:
        return hf.load_quantized(setup.model, "nf4", progress=progress, device=setup.device)


def adapted(model: Any, setup: Setup) -> PeftModel:
    """The model with adapters on attention and experts, which alone are trained."""
    if setup.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": setup.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    config = LoraConfig(
        r=setup.rank,
        lora_alpha=2 * setup.rank,
        target_modules=ATTENTION,
        target_parameters=EXPERTS,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(setup.seed)
    with hf.peft(model):
        return get_peft_model(model, config)


def reader(setup: Setup) -> Text:
    """How the model reads text."""
    return models.bytes_as_tokens() if setup.model in (BUNDLED, RANDOM) else models.tokens_of(Path(setup.model))


def windows(setup: Setup) -> Tensor:
    """[steps, windows, context + 1] tokens of real text.

    Raises:
        ValueError: the text is shorter than that.
    """
    tokens = reader(setup).encode(text.source())
    return text.windows_of(tokens, setup.steps, setup.windows, setup.context).to(setup.device)
