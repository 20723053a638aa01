"""What the tests of transformers' own expert parallelism run in the processes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import executors
from executors import hf
from moe_ref.conformance.mutants import mutants
from moe_ref.types import MoEWeights
from tiny_models import blocks

SPY = "spy"  # a name for the executor of a test
# How transformers spreads the experts over W ranks. With "tp_size" all ranks have the same tokens, and either all of
# them run on every rank's experts, or each rank's share of them travels. With "fsdp_size" each has a sequence.
WAYS: dict[str, dict[str, Any]] = {
    "all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "all_to_all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "fsdp": {"fsdp_size": 2, "ep_size": 2},
}


@dataclass
class Compared:
    """A model over the ranks beside the same one on one device.

    Attributes:
        output: the largest difference of logits, as a share of the largest logit.
        gradients: that of each parameter's gradient; infinite where one of the two has none.
        sides: for each layer, how many of this rank's tokens have experts on: rank 0 alone, rank 1 alone, both.
        calls: for each call of the executor, E of its weights, and whether some ids named no expert of these.
    """

    output: float
    gradients: dict[str, float]
    sides: list[tuple[int, int, int]] = field(default_factory=list)
    calls: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self.output, *self.gradients.values())


@dataclass(frozen=True)
class Spy:
    """An executor that notes what it is called with."""

    inner: executors.Executor
    calls: list[tuple[int, bool]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        self.calls.append((weights.num_experts, bool((topk_ids >= weights.num_experts).any())))
        return self.inner.experts(x, topk_ids=topk_ids, topk_weights=topk_weights, weights=weights)


def compared(group: Any, folder: Path, executor: str, way: str, tokens: Tensor, spoiled: str = "") -> Compared:
    """Runs a saved model over the ranks on an executor, and on one device in transformers' own loop.

    Args:
        group: of all ranks.
        folder: the model's.
        executor: a name, or "" for transformers' own grouped_mm.
        way: of `WAYS`.
        tokens: [sequences, n] ids; with "fsdp" two sequences.
        spoiled: the name of a mutant that takes the executor's place on rank 1.
    """
    rank = dist.get_rank(group)
    one = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").train()
    many = spread(folder, way).train()
    inner = executors.get(executor) if executor else None
    wrong = mutants(inner)[spoiled] if spoiled else inner
    own = slice(rank, rank + 1) if way == "fsdp" else slice(None)
    dy = torch.randn(*tokens.shape, one.config.vocab_size, generator=torch.Generator().manual_seed(1))
    with _routes(one, len(tokens), own) as sides, _runs(many, wrong if rank == 1 else inner) as calls:
        whole, part = one(tokens).logits, many(tokens[own]).logits
    whole.backward(dy)
    part.backward(dy[own] * (2 if way == "fsdp" else 1))  # FSDP takes the mean over ranks
    expected = {name: value.grad for name, value in one.named_parameters()}
    found = {name: _full(value.grad) for name, value in many.named_parameters()}
    return Compared(
        _difference(part.detach(), whole[own].detach()),
        {name: _difference(found[name], value) for name, value in expected.items()},
        sides,
        calls,
    )


def spread(folder: Path, way: str) -> Any:
    """A saved model over all processes, on transformers' own grouped_mm."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = DistributedConfig(**WAYS[way])
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="grouped_mm", distributed_config=config
    )


def quantised(_group: Any, folder: Path) -> str:
    """The refusal of 4 bits for experts that are spread already."""
    try:
        hf.quantize_experts(spread(folder, "fsdp"))
    except executors.Unsupported as error:
        return str(error)
    return ""


def _full(gradient: Tensor | None) -> Tensor | None:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    """The largest, as a share of the largest number expected."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    return difference / largest if largest else difference


@contextmanager
def _routes(model: nn.Module, sequences: int, own: slice) -> Iterator[list[tuple[int, int, int]]]:
    """Collects how the tokens of some sequences are routed in each layer of a model on one device."""
    sides: list[tuple[int, int, int]] = []

    def note(module: Any, given: tuple[Tensor, ...], _output: Tensor) -> None:
        ids = given[1].view(sequences, -1, given[1].shape[-1])[own].flatten(0, 1)
        second = ids >= module.num_experts // 2
        alone = int((~second).all(dim=1).sum()), int(second.all(dim=1).sum())
        sides.append((*alone, len(ids) - sum(alone)))

    hooks = [block.experts.register_forward_hook(note) for block in blocks(model)]
    yield sides
    for hook in hooks:
        hook.remove()


@contextmanager
def _runs(model: nn.Module, inner: executors.Executor | None) -> Iterator[list[tuple[int, bool]]]:
    """Puts the model on an executor, and collects what that is called with."""
    calls: list[tuple[int, bool]] = []
    if inner is None:
        yield calls
        return
    executors.register(SPY, lambda: Spy(inner, calls))
    try:
        hf.use(model, SPY)
        yield calls
    finally:
        executors.unregister(SPY)
