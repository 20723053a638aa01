"""A layer that is tuned for several T, one search for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from executors._bench.layers import BenchLayer, Shape, random_layer, with_adapters
from executors._bench.routing import batch
from executors._tune.choice import Choice, choose
from executors._tune.workload import Workload

FORWARD, WITH_BACKWARD = "forward", "forward_backward"

Show = Callable[[str, float, float], None]


class SearchFailed(RuntimeError):
    """A search ended without a choice; the message says why, in one line."""


@dataclass(frozen=True)
class TuneSettings:
    """What is tuned, where, and for how long."""

    shape: Shape
    dtype: str
    direction: str
    tokens: tuple[int, ...]  # T, one search for each
    routing: str
    seconds: float  # of all searches together
    device: str
    seed: int  # of weights and inputs
    rank: int  # of adapters beside frozen weights; 0 is none

    def as_json(self) -> dict[str, Any]:
        """The arguments in JSON."""
        names = ("dtype", "direction", "routing", "seconds", "seed", "rank")
        return {"layer": self.shape.name} | {name: getattr(self, name) for name in names}


def draw(settings: TuneSettings, show: Show) -> BenchLayer:
    """Draws the layer's weights; ``show`` is called with what is being done, experts drawn, and experts in all."""
    shape, device, seed = settings.shape, settings.device, settings.seed
    layer = random_layer(shape, device, seed, lambda done, total: show("drawing weights", done, total))
    return with_adapters(layer, settings.rank, seed) if settings.rank else layer


def search(settings: TuneSettings, layer: BenchLayer, tokens: int, show: Show) -> Choice:
    """Searches for one T, for its share of the time.

    Args:
        settings: what is tuned.
        layer: with weights.
        tokens: T.
        show: called with what is being done, seconds taken, and seconds in all.

    Raises:
        SearchFailed: the GPU's memory does not hold the layer, or the GPU failed.
    """
    given = batch(settings.routing, tokens, tokens, settings.shape, settings.device, settings.seed)
    workload = Workload(layer, given, getattr(torch, settings.dtype), settings.direction == WITH_BACKWARD)
    seconds = settings.seconds / len(settings.tokens)
    started, last = time.monotonic(), "the shipped tiles"

    def tell(text: str) -> None:
        nonlocal last
        last, taken = text, min(time.monotonic() - started, seconds)
        show(f"T={tokens}: {text}, {seconds - taken:.0f} s left", taken, seconds)

    with workload.guard(), torch.no_grad():
        try:
            return choose(workload, tokens, seconds, tell)
        except torch.OutOfMemoryError as error:
            allowed = "must be fewer, or the layer smaller: the GPU's memory does not hold it"
            raise SearchFailed(f"--tokens {tokens}: {allowed}") from error
        except torch.AcceleratorError as error:  # after which this process can do nothing more on it
            raise SearchFailed(f"the GPU failed at {last}: {str(error).splitlines()[0]}") from error
