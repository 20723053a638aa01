"""The fine-tune: AdamW on adapters, everything else frozen; each step sees other text, in the same order every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from executors import hf
from qlora.setup import Setup
from qlora.state import State, load_state, save_state


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    Attributes:
        learning_rate: after the warm-up.
        warmup_steps: over which it rises in a straight line.
        gradient_clip: largest norm of the gradient.
        accumulate: parts into which a step's windows are cut; gradients add up.
        save_every: steps between two states on disk.
    """

    learning_rate: float = 2e-3
    warmup_steps: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    accumulate: int = 1
    save_every: int = 5


def recipe_of(setup: Setup, save_every: int = 5) -> Recipe:
    """The recipe of a setup."""
    return Recipe(learning_rate=setup.learning_rate, accumulate=setup.accumulate, save_every=save_every)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model: Any, windows: Tensor) -> Tensor:
    """Mean cross entropy, in nats per token, of every token but the first in windows [B, T + 1].

    Logits are in fp32, a part of the vocabulary at a time. Rounded to bf16, a logit of 16 is off by up to 0.03.
    """
    base = model.get_base_model()
    hidden = base.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    head, rule = base.lm_head, logit_rule(base.config)
    return -hf.chunked_logprobs(hidden.float(), head.weight.float(), windows[:, 1:], bias=head.bias, **rule).mean()


def logit_rule(config: Any) -> dict[str, Any]:
    """What a model does to its logits, as `executors.hf.chunked_logprobs` takes it: Cohere's, Granite's, Gemma's."""
    config = config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = getattr(config, "logit_scale", None) or 1.0 / divisor
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def gradients(model: Any, windows: Tensor, accumulate: int) -> float:
    """Adds the gradients of the mean loss, part by part; returns that loss."""
    parts = windows.chunk(accumulate)
    total = 0.0
    for part in parts:
        loss = loss_of(model, part) * (len(part) / len(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def fine_tune(
    model: nn.Module,
    text: Tensor,
    recipe: Recipe,
    state_file: Path | None,
    run: str,
    progress: Callable[[int], object] = lambda step: None,
) -> State:
    """Fine-tunes the model in place, from the state on disk if there is one.

    Args:
        model: with adapters that have requires_grad.
        text: [steps, B, T + 1] tokens.
        recipe: how.
        state_file: where the state is kept; None keeps none.
        run: all that the losses depend on (`qlora.state`).
        progress: called with the steps taken.

    Raises:
        ValueError: the file is of another run.
    """
    parameters = trained(model)
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    state = (load_state(state_file, run, parameters, optimiser) if state_file else None) or State()
    progress(state.step)
    model.train()
    for windows in text[state.step :]:
        started = perf_counter()
        state.losses.append(one_step(model, windows, optimiser, recipe, state.step))
        state.seconds.append(perf_counter() - started)
        if state_file and (state.step % recipe.save_every == 0 or state.step == len(text)):
            save_state(state_file, run, state, parameters, optimiser)
        progress(state.step)
    return state


def one_step(model: nn.Module, windows: Tensor, optimiser: Any, recipe: Recipe, step: int) -> float:
    """One optimiser step; returns the loss before it."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps)
    loss = gradients(model, windows, recipe.accumulate)
    torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], recipe.gradient_clip)
    optimiser.step()
    optimiser.zero_grad()
    return loss
