"""What the specification and the executors exchange: configuration, weights, routing, grouping, gradients.

The dataclasses check nothing, because tracing and pytrees rebuild them with odd leaves; `moe_ref.validation` checks.

Sizes, everywhere: T tokens, E experts, K experts chosen per token (``top_k``), S = T*K slots, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, get_args

from moe_ref._typing import Array, Float, Int
from moe_ref.moving import FLOAT_DTYPES, check_device, dtype_name, moved, named_dtype, rounds
from moe_ref.packed_types import MXFP4Tensor as MXFP4Tensor
from moe_ref.packed_types import NF4Tensor as NF4Tensor
from moe_ref.packed_types import PackedTensor as PackedTensor
from moe_ref.packed_types import QuantType as QuantType
from moe_ref.saving import rebuild as rebuild
from moe_ref.saving import saved
from moe_ref.stacking import rows_of, stacked

Scoring = Literal["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"]
RenormalizeForm = Literal["add", "max"]
SelectionKey = Literal["score", "logit"]
GroupScore = Literal["max", "top2_sum"]
Activation = Literal["swiglu", "geglu", "geglu_tanh", "silu", "gelu", "gelu_tanh", "relu2"]
GateUpLayout = Literal["concatenated", "interleaved"]
Clamp = Literal["before", "after"]

GATED: tuple[Activation, ...] = ("swiglu", "geglu", "geglu_tanh")
PROJECTIONS = ("gate_up_proj", "down_proj")
DENSE = (*PROJECTIONS, "gate_up_proj_bias", "down_proj_bias")
LORA_FACTORS = ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b")
PARAMETERS = DENSE + LORA_FACTORS  # of the experts; they have gradients; the selection bias has none (D1)
PER_EXPERT = (*PARAMETERS, "expert_scale")  # with the routing's own; each has E in front
LEARNED = (*PER_EXPERT, "post_expert_norm")  # all that a layer may learn


@saved
@dataclass(frozen=True)
class MoEConfig:
    """The static part of a layer: hashable, compared by value, free of arrays.

    Attributes:
        top_k: K, the experts chosen per token; None where routing was done elsewhere (``.experts()``).
        scoring: "softmax" (over all E, then choose; Mixtral, Qwen3), "topk_softmax" (choose, then softmax over the K
            chosen; gpt-oss), "sigmoid" (DeepSeek-V3, Llama 4), or "sqrtsoftplus" (sqrt(log(1 + exp(logit)));
            DeepSeek-V4).
        renormalize: divide the K weights by (their sum + ``renormalize_eps``).
        renormalize_eps: the model's own epsilon (DeepSeek-V3: 1e-20). A zero sum gives 0, not 0/0, also with 0.
        renormalize_form: how the epsilon enters: "add", or "max" for a division by max(sum, ``renormalize_eps``)
            (ERNIE 4.5).
        routed_scaling_factor: multiplies the weights after that (DeepSeek-V3: 2.5).
        num_groups: experts are chosen within the best of this many groups of neighbours (DeepSeek-V3: 8); 1 is none.
        topk_groups: how many groups are kept (DeepSeek-V3: 4).
        group_score: a group's key is the "max" of its experts' keys (DeepSeek-V2) or the sum of its two largest,
            "top2_sum" (DeepSeek-V3).
        selection_key: what a selection bias is added to and groups are judged by: the "score" (DeepSeek-V3) or the
            "logit" (Kolibri 1).
        scale_input: the weight multiplies the expert's input instead of its output (Llama 4).
        activation: gated, h = act(g) * u: "swiglu", "geglu" (erf), "geglu_tanh"; or not, h = act(z): "silu", "gelu"
            (erf), "gelu_tanh", "relu2" (max(z, 0)**2). "swiglu" has a clamped form:
            h = (clamp(u, -limit, limit) + up_offset) * g' * sigmoid(alpha * g'), g' = min(g, limit); and a capped
            form: h = (cap(u) + up_offset) * cap(g) * sigmoid(alpha * g), cap(v) = c * tanh(v / c).
        alpha: slope inside the sigmoid of "swiglu"; 1 is plain SiLU, gpt-oss has 1.702.
        limit: clamp of gate (from above) and up (on both sides) of "swiglu"; None is no clamp, gpt-oss has 7.
        up_offset: added to the clamped or capped up half of "swiglu"; 0 is plain SwiGLU, gpt-oss has 1.
        clamp: whether ``limit`` clamps the gate "before" its activation (gpt-oss), or what comes "after" it,
            min(g * sigmoid(alpha * g), limit) (Step-3.7-Flash); up is clamped in both.
        gate_softcap: c of the gate's cap in "swiglu", with no limit; the sigmoid sees the gate without it (Inkling 2).
            None is no cap.
        up_softcap: the same of the up half, on its own.
        gate_up_layout: rows of a gated gate_up_proj are "concatenated" (all gates, then all ups) or "interleaved"
            (gate 0, up 0, gate 1, ...; gpt-oss).
        post_expert_norm_eps: added to the mean square of an expert's output, in a layer that has
            ``MoEWeights.post_expert_norm`` (Muse Spark: 1e-8).
    """

    top_k: int | None
    scoring: Scoring = "softmax"
    renormalize: bool = False
    renormalize_eps: float = 1e-20
    renormalize_form: RenormalizeForm = field(default="add", kw_only=True)
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "max"
    selection_key: SelectionKey = field(default="score", kw_only=True)
    scale_input: bool = False
    activation: Activation = "swiglu"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    clamp: Clamp = field(default="before", kw_only=True)
    gate_softcap: float | None = field(default=None, kw_only=True)
    up_softcap: float | None = field(default=None, kw_only=True)
    gate_up_layout: GateUpLayout = "concatenated"
    post_expert_norm_eps: float = field(default=1e-6, kw_only=True)

    @property
    def gated(self) -> bool:
        """Whether gate_up_proj holds gate and up rows, 2I of them (J = 2I), or up rows alone (J = I)."""
        return self.activation in GATED


@saved
@dataclass(frozen=True, eq=False)
class ExpertLoRA:
    """Low-rank adapters, one for each expert: a projection's result gains ``scaling * (row A^T) B^T``.

    The factors stay separate: no executor forms W + B A. Each projection has both factors or neither. Source: Hu et
    al. 2021 (arXiv:2106.09685). (Trap: PEFT stores lora_B as (out, r*E) with the expert *fastest*, lora_A as (E*r, in)
    with the expert slowest; here the expert is the first dimension of both.)

    Attributes:
        gate_up_lora_a, gate_up_lora_b: A and B of gate_up_proj, of rank r.
        down_lora_a, down_lora_b: A and B of down_proj, of rank q.
        gate_up_scaling, down_scaling: PEFT's lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.
    """

    gate_up_lora_a: Float[Array, "E r H"] | None = None
    gate_up_lora_b: Float[Array, "E J r"] | None = None
    down_lora_a: Float[Array, "E q I"] | None = None
    down_lora_b: Float[Array, "E H q"] | None = None
    gate_up_scaling: float = 1.0
    down_scaling: float = 1.0


@saved
@dataclass(frozen=True, eq=False)
class MoEWeights:
    """A thin view of a layer's parameters: build it per call, free of copies.

    The projections may be views of any strides: a model that stores (E, H, 2I) passes ``.transpose(1, 2)``. J is 2I for
    gated activations and I for the others. Each projection is an array or, in 4 bits, an `NF4Tensor` or `MXFP4Tensor`.
    """

    gate_up_proj: Float[Array, "E J H"]  # or in 4 bits
    down_proj: Float[Array, "E H I"]  # or in 4 bits
    gate_up_proj_bias: Float[Array, "E J"] | None = None
    down_proj_bias: Float[Array, "E H"] | None = None
    selection_bias: Float[Array, " E"] | None = None  # changes the choice only, never the weight (R3)
    lora: ExpertLoRA | None = None
    _: KW_ONLY
    config: MoEConfig
    expert_scale: Float[Array, " E"] | None = None  # multiplies the weights that routing gives; learned (R9)
    post_expert_norm: Float[Array, " H"] | None = None  # gamma of the norm of each expert's output; learned (E8)

    @classmethod
    def stack(
        cls,
        *,
        down_proj: Any,
        gate_up_proj: Any = None,
        gate_proj: Any = None,
        up_proj: Any = None,
        down_proj_bias: Any = None,
        gate_up_proj_bias: Any = None,
        gate_proj_bias: Any = None,
        up_proj_bias: Any = None,
        config: MoEConfig,
        **others: Any,
    ) -> MoEWeights:
        """The layer of experts that are stored one by one, or whose gate and up projections are apart (w1, w3; w2).

        It costs a copy: new memory of the size of each stack that is built, beside the parts until they are freed (and
        while it runs once more, where gates and ups are interleaved). So call it once, when a model is loaded, and
        keep the result, which `executors.nn.Experts` makes parameters of. What is a stack already is not copied. In
        torch the copy is differentiable.

        Args:
            down_proj: [E, H, I], or a sequence of E arrays [H, I]; as all others, a stack or a sequence.
            gate_up_proj: [E, J, H], or None where its halves are given.
            gate_proj: [E, I, H]; ``config.gate_up_layout`` says how its rows and those of up_proj are laid.
            up_proj: [E, I, H]; alone where the activation is not gated.
            down_proj_bias: [E, H].
            gate_up_proj_bias: [E, J].
            gate_proj_bias: [E, I].
            up_proj_bias: [E, I].
            config: the layer's configuration.
            **others: of `MoEWeights`, as they are.

        Raises:
            ValueError, TypeError: one line naming the argument, its value, and what is allowed; also for parts in 4
                bits, which `executors.nf4` joins: ``fuse`` gate and up, ``from_linears`` experts one by one. A whole
                projection in 4 bits is taken as it is.
        """
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config is a {type(config).__name__}: must be a MoEConfig")
        for name, kinds in (("activation", Activation), ("gate_up_layout", GateUpLayout)):
            if (value := getattr(config, name)) not in get_args(kinds):
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, get_args(kinds)))}")
        layout = config.gate_up_layout if config.gated else ""
        return cls(
            rows_of(gate_up_proj, gate_proj, up_proj, "", layout),
            stacked("down_proj", down_proj),
            rows_of(gate_up_proj_bias, gate_proj_bias, up_proj_bias, "_bias", layout),
            stacked("down_proj_bias", down_proj_bias),
            config=config,
            **others,
        )

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

    def parameters(self) -> dict[str, Array]:
        """What the layer has of `LEARNED`, by name: these have gradients.

        A projection in 4 bits has no gradient and is left out: see `packed`.
        """
        found = {name: getattr(self, name) for name in DENSE}
        found |= {name: getattr(self.lora, name, None) for name in LORA_FACTORS}
        found |= {"expert_scale": self.expert_scale, "post_expert_norm": self.post_expert_norm}
        return {
            name: value for name, value in found.items() if value is not None and not isinstance(value, PackedTensor)
        }

    def packed(self) -> dict[str, PackedTensor]:
        """The projections in 4 bits, by name."""
        projections = {name: getattr(self, name) for name in PROJECTIONS}
        return {name: value for name, value in projections.items() if isinstance(value, PackedTensor)}

    def with_parameters(self, changed: dict[str, Array]) -> MoEWeights:
        """The same layer with some of its `parameters` or `packed` projections replaced."""
        factors = {name: value for name, value in changed.items() if name in LORA_FACTORS}
        others = {name: value for name, value in changed.items() if name in LEARNED and name not in factors}
        lora = replace(self.lora, **factors) if self.lora is not None else None
        return replace(self, **others, lora=lora)

    def to(self, device: Any = None, *, dtype: Any = None) -> MoEWeights:
        """The same layer on another device, computed in another dtype.

        ``dtype`` casts the `parameters`, differentiably where their library is. It does not cast the selection bias:
        rounded, that would choose other experts (R3). Nor does it cast codes and scales of projections in 4 bits: they
        decode to it.

        Args:
            device: of the arrays' library; None for where they are.
            dtype: fp64, fp32, bf16 or fp16, as a dtype or its name; None for what it is. 4 bits do not decode to fp64.

        Raises:
            ValueError, TypeError: one line naming the argument, its value, and what is allowed.
        """
        check_device(device)
        named_dtype(dtype, FLOAT_DTYPES)
        changed: dict[str, Any] = {name: moved(value, device, dtype) for name, value in self.parameters().items()}
        changed |= {name: value.to(device, dtype=dtype) for name, value in self.packed().items()}
        bias = self.selection_bias
        return replace(self.with_parameters(changed), selection_bias=None if bias is None else moved(bias, device))

    def map(self, change: Callable[[Array], Array]) -> MoEWeights:
        """The same layer with every array changed, also the selection bias, but no projection in 4 bits.

        It is for moves, copies and views. `to` is for casts, and moves 4 bits too.

        Raises:
            TypeError: the change casts the selection bias to a dtype that rounds it (R3).
        """
        changed = self.with_parameters({name: change(value) for name, value in self.parameters().items()})
        if self.selection_bias is None:
            return changed
        bias = change(self.selection_bias)
        if rounds(self.selection_bias, bias):
            allowed = f"must be {dtype_name(self.selection_bias)}, or hold it exactly, since it chooses experts (R3)"
            raise TypeError(
                f"selection_bias.dtype={dtype_name(bias)}: {allowed}; weights.to(dtype=...) leaves it alone"
            )
        return replace(changed, selection_bias=bias)


@saved
@dataclass(frozen=True, eq=False)
class Routing:
    """The experts of each token, ordered by (key descending, id ascending), and their weights."""

    topk_ids: Int[Array, "T K"]
    topk_weights: Float[Array, "*#samples T K"]


@saved
@dataclass(frozen=True, eq=False)
class Grouping:
    """Slots sorted by expert.

    ``group_offsets`` are *exclusive* and start with 0, as in JAX and triton_kernels. (Trap: torch's
    ``grouped_mm(offs=)``, transformers, scattermoe and megablocks take *inclusive ends* of length E.)
    """

    order: Int[Array, " S"]  # order[i] is the slot in row i; slot s belongs to token s // K
    inverse: Int[Array, " S"]  # inverse[order[i]] == i
    group_sizes: Int[Array, " E"]  # rows of each expert; sums to the number of slots that name an expert
    group_offsets: Int[Array, " E+1"]  # expert e has rows group_offsets[e] .. group_offsets[e + 1] - 1


@saved
@dataclass(frozen=True, eq=False)
class MoEGradients:
    """Gradients of <dy, y>, each in the shape of its argument; None for arguments that the layer does not have."""

    x: Array
    router_logits: Array | None  # None if the caller gave the routing
    topk_weights: Array
    gate_up_proj: Array | None = None  # None for frozen projections in 4 bits
    down_proj: Array | None = None
    gate_up_proj_bias: Array | None = None
    down_proj_bias: Array | None = None
    gate_up_lora_a: Array | None = None
    gate_up_lora_b: Array | None = None
    down_lora_a: Array | None = None
    down_lora_b: Array | None = None
    expert_scale: Array | None = None  # None too if the caller gave the routing
    post_expert_norm: Array | None = None
