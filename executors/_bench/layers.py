"""The layers of the benchmark: sizes of real models, weights and activations drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_ref.types import LORA_FACTORS, ExpertLoRA, MoEConfig, MoEWeights, PackedTensor

MULTIPLE = 16  # sizes stay a multiple of this: grouped products want rows of 16 bytes
CPU_CUT = {"deepseek-v3": 4}  # H and I are divided by this on a CPU, whose memory does not hold the layer
LORA_SCALING = 2.0  # lora_alpha = 2 r
BIAS_DEVIATION = LORA_DEVIATION = 0.1  # of a bias; of the norm of a row of B


@dataclass(frozen=True)
class Storage:
    """The storage form of a layer's weights, and what of them is trained.

    Attributes:
        weight_bytes: of one number of a projection, its share of the statistics included.
        frozen: whether projections and biases have no gradient.
        rank: r of the adapters on both projections, which are trained; 0 is none.
    """

    weight_bytes: float = 2.0
    frozen: bool = False
    rank: int = 0


DENSE = Storage()


@dataclass(frozen=True)
class Shape:
    """A layer's sizes and configuration.

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

    def as_json(self) -> dict[str, Any]:
        """Name and sizes."""
        sizes = {"E": self.experts, "K": self.top_k, "H": self.hidden, "I": self.intermediate}
        return {"layer": self.name, **sizes, "cut": self.cut}

    def __str__(self) -> str:
        cut = f" (H and I cut by {self.cut})" if self.cut > 1 else ""
        return f"{self.name}{cut}: E={self.experts}, K={self.top_k}, H={self.hidden}, I={self.intermediate}"

    @property
    def expert_matrices(self) -> int:
        """Numbers in both projections of one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_biases(self) -> int:
        """Numbers in both biases of one expert."""
        return 2 * self.intermediate + self.hidden if self.biases else 0

    @property
    def expert_weights(self) -> int:
        """Parameters of one expert."""
        return self.expert_matrices + self.expert_biases

    def expert_factors(self, rank: int) -> int:
        """Numbers in the adapters of one expert."""
        return rank * (2 * self.hidden + 3 * self.intermediate)

    def flops(self, tokens: int, backward: bool, storage: Storage = DENSE) -> int:
        """Of the products: 2 S H 2I + 2 S I H forward; backward the same again for rows, and for what is trained."""
        slots = tokens * self.top_k
        matrices, factors = 2 * slots * self.expert_matrices, 2 * slots * self.expert_factors(storage.rank)
        if not backward:
            return matrices + factors
        return (2 if storage.frozen else 3) * matrices + 3 * factors

    def bytes_moved(self, tokens: int, active: int, backward: bool, storage: Storage = DENSE) -> int:
        """The least that must pass through memory, with activations in bf16.

        Forward: the weights of the ``active`` experts once, as they are kept, x and y. Backward, besides: those weights
        once more, x, dy and dx, and the gradients of all experts, which are dense (zeros where an expert has no token).
        """
        factors = 2 * self.expert_factors(storage.rank)
        trained = factors if storage.frozen else 2 * self.expert_weights + factors
        expert = round(storage.weight_bytes * self.expert_matrices) + 2 * self.expert_biases + factors
        weights, row = active * expert, 2 * tokens * self.hidden
        forward = weights + 2 * row
        return forward + weights + 3 * row + self.experts * trained if backward else forward


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
    """A layer with weights, in the model's own storage.

    Attributes:
        shape: its sizes.
        parameters: what is trained, by name: leaves.
        frozen: what is not, by name.
        storage: of the weights.
        decoded: dense copies of the projections in 4 bits, made at their first use.
    """

    shape: Shape
    parameters: dict[str, torch.nn.Parameter]
    frozen: dict[str, Tensor | PackedTensor] = field(default_factory=dict)
    storage: Storage = DENSE
    decoded: dict[str, Tensor] = field(default_factory=dict)

    def weights(self) -> MoEWeights:
        """Views of the parameters in canonical shapes, built per call as a model would."""
        views = {name: self.canonical(name, value) for name, value in (self.frozen | self.parameters).items()}
        factors = {name: views[name] for name in LORA_FACTORS if name in views}
        lora = ExpertLoRA(**factors, gate_up_scaling=LORA_SCALING, down_scaling=LORA_SCALING) if factors else None
        return MoEWeights(
            views["gate_up_proj"],
            views["down_proj"],
            views.get("gate_up_proj_bias"),
            views.get("down_proj_bias"),
            lora=lora,
            config=self.shape.config,
        )

    def canonical(self, name: str, value: Any) -> Any:
        """A parameter, or its gradient, in its canonical shape."""
        return value.transpose(1, 2) if self.shape.transposed and name.endswith("_proj") else value


def sized(name: str, scale: int, device: str, multiple: int = MULTIPLE) -> Shape:
    """The layer of that name, with H and I divided by ``scale``, and on a CPU by `CPU_CUT` too.

    Quotients are rounded up to a multiple of ``multiple``.
    """
    shape = LAYERS[name]
    cut = scale * (CPU_CUT.get(name, 1) if torch.device(device).type == "cpu" else 1)
    hidden, intermediate = (-(-size // (cut * multiple)) * multiple for size in (shape.hidden, shape.intermediate))
    return replace(shape, hidden=hidden, intermediate=intermediate, cut=cut) if cut > 1 else shape


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
        deviations |= {"gate_up_proj_bias": BIAS_DEVIATION, "down_proj_bias": BIAS_DEVIATION}
    stacks = {name: torch.empty(size, dtype=torch.bfloat16, device=device) for name, size in sizes.items()}
    for expert in range(e):
        for name, stack in stacks.items():
            stack[expert].normal_(0.0, deviations[name], generator=generator)
        progress(expert + 1, e)
    return BenchLayer(shape, {name: torch.nn.Parameter(stack) for name, stack in stacks.items()})


def with_adapters(layer: BenchLayer, rank: int, seed: int) -> BenchLayer:
    """The same layer with adapters in bf16 that are trained: A ~ N(0, 1 / fan-in), B ~ N(0, 0.1**2 / r)."""
    shape = layer.shape
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    sizes = ((e, rank, h), (e, 2 * i, rank), (e, rank, i), (e, h, rank))
    device = layer.weights().gate_up_proj.device
    generator = torch.Generator(device).manual_seed(seed + 1)
    factors = {}
    for name, size in zip(LORA_FACTORS, sizes, strict=True):
        deviation = (LORA_DEVIATION if name.endswith("_b") else 1.0) / math.sqrt(size[-1])
        drawn = torch.empty(size, dtype=torch.bfloat16, device=device)
        factors[name] = torch.nn.Parameter(drawn.normal_(0.0, deviation, generator=generator))
    return replace(layer, parameters=layer.parameters | factors, storage=replace(layer.storage, rank=rank))
