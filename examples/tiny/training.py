"""Training: AdamW on the same few windows of text, with any way to compute the experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import executors
from moe_ref.routing import route
from moe_ref.types import MoEWeights
from tiny.model import Compute, Model

Choices = Sequence[Tensor]  # for each call of the layer, in order: [T, E], whether a token goes to an expert


@dataclass(frozen=True)
class Recipe:
    """How to train: at the learning rate with which the bundled training ended, warmed up for a new optimiser."""

    steps: int = 20
    learning_rate: float = 2e-4
    warmup_steps: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


@dataclass(frozen=True)
class Run:
    """What came of a training run.

    Attributes:
        losses: before each step, in nats per byte.
        choices: which experts the run's own router logits choose, for each call of a layer.
    """

    losses: list[float]
    choices: list[Tensor]


@dataclass
class Watched:
    """Computes experts, notes which ones the router chooses, and may hold tokens to the choices of another run.

    Attributes:
        compute: what computes the experts.
        held_to: the choices of that run, or None.
        seen: the run's own choices, so far.
    """

    compute: Compute
    held_to: Choices | None = None
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer. A logit of -inf is never chosen, and none of the others notices (clause R4)."""
        own = chosen(router_logits, weights)
        self.seen.append(own)
        if self.held_to is not None:
            held = self.held_to[len(self.seen) - 1].view_as(router_logits)
            router_logits = router_logits.masked_fill(~held, -torch.inf)
        return self.compute(x, router_logits, weights)


def on_executor(executor: executors.Executor, dtype: torch.dtype) -> Compute:
    """Experts in ``dtype`` on an executor, in a model that is in float64 elsewhere."""

    def compute(x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        low = weights.to(dtype=dtype)  # still views of (E, H, 2I) and (E, I, H)
        return executor(x.to(dtype), router_logits.float(), low).to(x.dtype)

    return compute


def chosen(router_logits: Tensor, weights: MoEWeights) -> Tensor:
    """[T, E], whether a token goes to an expert, by router logits in float32."""
    logits = router_logits.detach().float().reshape(-1, weights.num_experts)
    ids = route(logits, weights.config).topk_ids
    return torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter(1, ids.long(), True)


def train(
    model: Model,
    windows: Tensor,
    compute: Compute,
    recipe: Recipe,
    held_to: Choices | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Run:
    """Trains a copy of the model.

    Args:
        model: where to begin; stays as it is.
        windows: [B, T + 1] bytes; every step sees all of them.
        compute: what computes the experts.
        recipe: how to train.
        held_to: choices of experts to keep to, of another run with the same model, windows and recipe.
        progress: called after each step.
    """
    model = copy.deepcopy(model)
    watched = Watched(compute, held_to)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")]
    vectors = [p for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("bias")]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / recipe.warmup_steps))
    losses = []
    for _ in range(recipe.steps):
        loss = model.loss(windows, watched)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        progress()
    return Run(losses, watched.seen)
