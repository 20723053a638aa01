"""What the benchmark measures: settings, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

import executors
from executors._bench import mxfp4
from executors._bench.case import DENSE_WEIGHTS, FORWARD, LORA, WITH_BACKWARD
from executors._bench.layers import LAYERS
from executors._bench.measure import MIN_ROUNDS
from executors._bench.peers import gnf4, kt, liger
from executors._bench.peers import loops as bench_loops
from executors._bench.peers.bitsandbytes import LOOPS, ON_STACKS, SUFFIX
from executors._bench.peers.transformers import IMPLEMENTATIONS, PREFIX
from executors._bench.quantised import QUANT_TYPES, Quantisation
from executors._bench.routing import KINDS
from executors._bench.variants import TRITON

DENSE = "dense"
WEIGHTS = (DENSE, *QUANT_TYPES)
DIRECTIONS = (FORWARD, WITH_BACKWARD)
DIRECTIONS_IN_4_BITS = (*DIRECTIONS, LORA)
DEFAULT_LAYERS = {"cpu": ("qwen3-30b-a3b",), "cuda": tuple(LAYERS)}
DEFAULT_TOKENS = {"cpu": (1, 8, 64, 512), "cuda": (1, 8, 64, 512, 4096, 32768)}
DEFAULT_SECONDS = {"cpu": 10.0, "cuda": 0.5}

Value = TypeVar("Value")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        names: our executors.
        layers: names of `LAYERS`.
        tokens: T, one case for each.
        routings: of `KINDS`; None is "real", and dense and forward all three.
        directions: of `DIRECTIONS_IN_4_BITS`, of which dense weights have the first two.
        scale: H and I are divided by this.
        seconds: how long the rounds of one case go on.
        device: where.
        seed: of weights, inputs, samples and the order of calls.
        load: processes running on the machine before, on average over a minute.
        weights: of `WEIGHTS`.
        nested: whether the scales of 4 bits are quantised too.
        lora_rank: of the adapters.
        memory: whether peak memory is measured.
        rounds: of one case, at least.
        limit: seconds after which no further case is begun; None is no limit.
        without: names of `known_peers` that are left out.
        graphs: whether calls are timed in a CUDA graph too, on a GPU.
        interpreted: whether executors whose kernels are interpreted take part; their times are no measurement.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...] = DEFAULT_LAYERS["cpu"]
    tokens: tuple[int, ...] = DEFAULT_TOKENS["cpu"]
    routings: tuple[str, ...] | None = None
    directions: tuple[str, ...] = DIRECTIONS
    scale: int = 1
    seconds: float = DEFAULT_SECONDS["cpu"]
    device: str = "cpu"
    seed: int = 0
    load: float = 0.0
    weights: str = DENSE
    nested: bool = False
    lora_rank: int = 16
    memory: bool = False
    rounds: int = MIN_ROUNDS
    limit: float | None = None
    interpreted: bool = False
    graphs: bool = True
    without: tuple[str, ...] = ()

    @property
    def gpu(self) -> bool:
        """Whether it is measured on a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised, or None for dense ones."""
        return next((Quantisation(t, self.nested) for t in QUANT_TYPES if t == self.weights), None)

    def pairs(self) -> list[tuple[str, str]]:
        """(routing, direction) of the cases of one layer, with equal routings side by side."""
        if self.routings is not None:
            return [(routing, direction) for routing in self.routings for direction in self.directions]
        everywhere = FORWARD if self.weights == DENSE else ""
        return [(r, d) for r in KINDS for d in self.directions if d == everywhere or r == KINDS[0]]

    def cases(self) -> int:
        """How many cases there are."""
        return len(self.layers) * len(self.tokens) * len(self.pairs())


def default_names(everyone: list[str], weights: str, device: str, interpreted: bool) -> list[str]:
    """Our contenders by default.

    In 4 bits ``triton`` and ``grouped_nf4`` have the same kernels, so ``triton`` takes part with dense weights only.
    """
    found = [name for name in everyone if takes(name, weights)]
    if weights == DENSE:
        return found
    on_gpu = torch.device(device).type == "cuda"
    return [name for name in found if name != TRITON] + ([DENSE_WEIGHTS] if on_gpu or interpreted else [])


def takes(name: str, weights: str) -> bool:
    """Whether an executor declares such weights. An unavailable one counts: its row says why it did not run."""
    try:
        return weights in executors.get(name).capabilities.weights
    except executors.Unavailable:
        return True


def known_peers() -> list[str]:
    """The names of all peers, whatever layer and device they are for."""
    loops = [prefix + kind for prefix in (LOOPS, mxfp4.PREFIX) for kind in bench_loops.KINDS]
    stacks = [PREFIX + name + SUFFIX for name in ON_STACKS]
    products = [gnf4.NAME, kt.NAME, liger.NAME]
    return [*(PREFIX + name for name in IMPLEMENTATIONS), *products, *stacks, *loops]


def default(by_device: dict[str, Value], device: str) -> Value:
    """The default on a device, such as of `DEFAULT_TOKENS`."""
    return by_device.get(torch.device(device).type, by_device["cpu"])
