"""The layers of the benchmark: sizes of real models, weights and activations drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_ref.types import MoEConfig, MoEWeights

MULTIPLE = 16  # sizes stay a multiple of this: grouped products want rows of 16 bytes
CPU_CUT = {"deepseek-v3": 4}  # what a CPU cannot hold


@dataclass(frozen=True)
class Shape:
    """A layer's sizes and form.

    Attributes:
        name: the model.
        experts: E.
        hidden: H.
        intermediate: I.
        config: the static part; its top_k is K.
        biases: whether both projections have one.
        transposed: whether the model stores (E, H, 2I) and (E, I, H).
        routing_dtype: of the weights that the model's router gives.
        cut: H and I are the model's divided by this.
    """

    name: str
    experts: int
    hidden: int
    intermediate: int
    config: MoEConfig
    biases: bool = False
    transposed: bool = False
    routing_dtype: torch.dtype = torch.float32
    cut: int = 1

    @property
    def top_k(self) -> int:
        """K."""
        assert self.config.top_k is not None
        return self.config.top_k

    @property
    def expert_weights(self) -> int:
        """Parameters of one expert."""
        bias = 2 * self.intermediate + self.hidden if self.biases else 0
        return 3 * self.hidden * self.intermediate + bias

    def flops(self, tokens: int, backward: bool) -> int:
        """Of the products: 2 S H 2I + 2 S I H forward, and twice that again backward."""
        forward = 6 * tokens * self.top_k * self.hidden * self.intermediate
        return 3 * forward if backward else forward

    def bytes_moved(self, tokens: int, active: int, backward: bool) -> int:
        """The least that must pass through memory, in bf16.

        Forward: the weights of the ``active`` experts once, x and y. Backward, besides: those weights once more, x, dy
        and dx, and the gradients of all experts, which are dense (zeros where an expert has no token).
        """
        weights, row = active * self.expert_weights, tokens * self.hidden
        forward = weights + 2 * row
        backward_only = weights + 3 * row + self.experts * self.expert_weights
        return 2 * (forward + backward_only if backward else forward)


LAYERS = {
    shape.name: shape
    for shape in (
        Shape(
            "gpt-oss-20b",
            experts=32,
            hidden=2880,
            intermediate=2880,
            config=MoEConfig(
                top_k=4, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved"
            ),
            biases=True,
            transposed=True,
            routing_dtype=torch.bfloat16,
        ),
        Shape(
            "qwen3-30b-a3b",
            experts=128,
            hidden=2048,
            intermediate=768,
            config=MoEConfig(top_k=8, scoring="softmax", renormalize=True),
            routing_dtype=torch.bfloat16,
        ),
        Shape(
            "mixtral-8x7b",
            experts=8,
            hidden=4096,
            intermediate=14336,
            config=MoEConfig(top_k=2, scoring="softmax", renormalize=True),
        ),
        Shape(
            "deepseek-v3",
            experts=256,
            hidden=7168,
            intermediate=2048,
            config=MoEConfig(
                top_k=8, scoring="sigmoid", renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=2.5
            ),
        ),
    )
}


@dataclass(frozen=True, eq=False)
class BenchLayer:
    """A layer with weights.

    Attributes:
        shape: its sizes.
        parameters: leaves in the model's own storage, by name.
    """

    shape: Shape
    parameters: dict[str, torch.nn.Parameter]

    def weights(self) -> MoEWeights:
        """Views of the parameters in canonical shapes, built per call as a model would."""
        views: dict[str, Tensor] = {name: self.canonical(name, value) for name, value in self.parameters.items()}
        return MoEWeights(
            views["gate_up_proj"],
            views["down_proj"],
            views.get("gate_up_proj_bias"),
            views.get("down_proj_bias"),
            config=self.shape.config,
        )

    def canonical(self, name: str, value: Tensor) -> Tensor:
        """A parameter, or its gradient, in its canonical shape."""
        return value.transpose(1, 2) if self.shape.transposed and not name.endswith("_bias") else value


def sized(name: str, scale: int, device: str) -> Shape:
    """The layer of that name, with H and I divided by ``scale``, and on a CPU by what it cannot hold."""
    shape = LAYERS[name]
    cut = scale * (CPU_CUT.get(name, 1) if torch.device(device).type == "cpu" else 1)
    return replace(shape, hidden=_divided(shape.hidden, cut), intermediate=_divided(shape.intermediate, cut), cut=cut)


def random_layer(shape: Shape, device: str, seed: int, progress: Callable[[int, int], None]) -> BenchLayer:
    """Draws weights N(0, 1 / fan-in) in bf16, in place, and biases N(0, 0.1**2).

    Args:
        shape: sizes.
        device: where.
        seed: of the weights.
        progress: called with (experts drawn, experts in all).
    """
    generator = torch.Generator(device).manual_seed(seed)
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    sizes: dict[str, tuple[int, ...]] = {"gate_up_proj": (e, 2 * i, h), "down_proj": (e, h, i)}
    deviations = {"gate_up_proj": 1 / math.sqrt(h), "down_proj": 1 / math.sqrt(i)}
    if shape.transposed:
        sizes = {"gate_up_proj": (e, h, 2 * i), "down_proj": (e, i, h)}
    if shape.biases:
        sizes |= {"gate_up_proj_bias": (e, 2 * i), "down_proj_bias": (e, h)}
        deviations |= {"gate_up_proj_bias": 0.1, "down_proj_bias": 0.1}
    stacks = {name: torch.empty(size, dtype=torch.bfloat16, device=device) for name, size in sizes.items()}
    for expert in range(e):
        for name, stack in stacks.items():
            stack[expert].normal_(0.0, deviations[name], generator=generator)
        progress(expert + 1, e)
    return BenchLayer(shape, {name: torch.nn.Parameter(stack) for name, stack in stacks.items()})


def _divided(size: int, by: int) -> int:
    return -(-size // (by * MULTIPLE)) * MULTIPLE
