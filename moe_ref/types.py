"""What the specification and the executors exchange: configuration, weights, routing, grouping, gradients.

The dataclasses only hold; checking lives in `moe_ref.validation`, because tracing and pytrees rebuild such objects
with odd leaves.

Sizes, everywhere: T tokens, E experts, K experts chosen per token (``top_k``), S = T*K slots, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from moe_ref._typing import Array, Float, Int

Scoring = Literal["softmax", "topk_softmax", "sigmoid"]
Activation = Literal["swiglu"]
GateUpLayout = Literal["concatenated", "interleaved"]


@dataclass(frozen=True)
class MoEConfig:
    """The static part of a layer: hashable, compared by value, free of arrays.

    Attributes:
        top_k: K, the experts chosen per token; None where routing was done elsewhere (``.experts()``).
        scoring: "softmax" (over all E, then choose; Mixtral, Qwen3), "topk_softmax" (choose, then softmax over the K
            chosen; gpt-oss), or "sigmoid" (DeepSeek-V3, Llama 4).
        renormalize: divide the K weights by (their sum + ``renormalize_eps``).
        renormalize_eps: the model's own epsilon (DeepSeek-V3: 1e-20), so that a zero sum does not give 0/0.
        routed_scaling_factor: multiplies the weights last (DeepSeek-V3: 2.5).
        activation: "swiglu": h = (clamp(u, -limit, limit) + up_offset) * g' * sigmoid(alpha * g'), g' = min(g, limit).
        alpha: slope inside the sigmoid; 1 is plain SiLU, gpt-oss has 1.702.
        limit: clamp of gate (from above) and up (on both sides); None is no clamp, gpt-oss has 7.
        up_offset: added to the clamped up half; 0 is plain SwiGLU, gpt-oss has 1.
        gate_up_layout: rows of gate_up_proj are "concatenated" (all gates, then all ups) or "interleaved"
            (gate 0, up 0, gate 1, ...; gpt-oss).
    """

    top_k: int | None
    scoring: Scoring = "softmax"
    renormalize: bool = False
    renormalize_eps: float = 1e-20
    routed_scaling_factor: float = 1.0
    activation: Activation = "swiglu"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    gate_up_layout: GateUpLayout = "concatenated"


@dataclass(frozen=True, eq=False)
class MoEWeights:
    """A thin view of a layer's parameters: build it per call, free of copies.

    The projections may be views of any strides: a model that stores (E, H, 2I) passes ``.transpose(1, 2)``.
    """

    gate_up_proj: Float[Array, "E 2*I H"]
    down_proj: Float[Array, "E H I"]
    gate_up_proj_bias: Float[Array, "E 2*I"] | None = None
    down_proj_bias: Float[Array, "E H"] | None = None
    _: KW_ONLY
    config: MoEConfig

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up_proj.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gate_up_proj.shape[2]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.down_proj.shape[2]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts a token goes to, ordered by (key descending, id ascending), and with what weight."""

    topk_ids: Int[Array, "T K"]
    topk_weights: Float[Array, "*#samples T K"]


@dataclass(frozen=True, eq=False)
class Grouping:
    """Slots sorted by expert.

    ``group_offsets`` are *exclusive* and start with 0, as in JAX and triton_kernels. (Trap: torch's
    ``grouped_mm(offs=)``, transformers, scattermoe and megablocks take *inclusive ends* of length E.)
    """

    order: Int[Array, " S"]  # order[i] is the slot that stands in row i; slot s belongs to token s // K
    inverse: Int[Array, " S"]  # inverse[order[i]] == i
    group_sizes: Int[Array, " E"]  # rows of each expert; sums to the number of slots that name an expert
    group_offsets: Int[Array, " E+1"]  # expert e has rows group_offsets[e] .. group_offsets[e + 1] - 1


@dataclass(frozen=True, eq=False)
class MoEGradients:
    """Gradients of <dy, y>, each in the shape of what it belongs to; None for what the layer does not have."""

    x: Array
    router_logits: Array | None  # None where the caller brought the routing
    topk_weights: Array
    gate_up_proj: Array
    down_proj: Array
    gate_up_proj_bias: Array | None = None
    down_proj_bias: Array | None = None
