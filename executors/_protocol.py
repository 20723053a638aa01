"""What an executor is, what it declares, and how it says no. Standard library only at run time."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from executors._declared import (
    ACTIVATIONS,
    BLOCKSIZES,
    DTYPES,
    GATE_UP_LAYOUTS,
    ID_DTYPES,
    NESTED,
    RENORMALIZE_FORMS,
    SCORINGS,
    SELECTION_KEYS,
    STRIDED,
    refuse_wrong,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights, Routing


class Unavailable(RuntimeError):
    """This machine lacks something that the executor needs; the message says what."""


class Unsupported(ValueError):
    """The executor cannot take this input; the message names the argument, its value, and what is allowed.

    A ValueError, as every refusal of an argument: another input, or another executor, will do.
    """


class UnknownExecutor(LookupError):
    """No executor has this name; the message lists those that exist."""


@dataclass(frozen=True)
class Capabilities:
    """What an executor declares; the conformance suite draws problems within it, and says aloud what is left out.

    A field that is not given promises all that the specification has, but for those whose default is less
    (``post_expert_norm``, ``weights``, ``mixed``, ``batch_invariant``). To refuse within the declaration is a failure.

    Raises:
        ValueError: a name or number that is not allowed, such as ``dtypes={"fp32"}``, or an empty set that leaves
            nothing to judge; one line with what is allowed.
        TypeError: a value of another type, such as a list for a set.

    Attributes:
        devices: device types it runs on, such as "cpu" and "cuda"; empty is any.
        dtypes: names of the dtypes that x and the projections may have.
        bias_dtypes: names of the dtypes that biases may have, and with them the selection bias, the experts' scales and
            the norm's factor; in this and the other sets of dtypes "x" stands for that of x.
        router_logits_dtypes: likewise of router_logits.
        topk_weights_dtypes: likewise of topk_weights.
        topk_ids_dtypes: of "int32" and "int64", those that topk_ids may have.
        lora_dtypes: likewise of the adapters' factors.
        strided: which arguments may have any strides: "x", "routing" (logits, ids and weights), "weights" (projections,
            also in 4 bits, biases, adapters). Others are contiguous. An upstream gradient may always have any.
        align_hidden: H is a multiple of it.
        align_intermediate: I is a multiple of it.
        empty_batch: whether it takes no tokens at all, T = 0 (E3).
        empty_slots: whether ids may lie outside [0, E) (R7).
        duplicate_ids: whether one token may have one expert in several slots.
        backward: whether it has gradients (D1).
        routing: whether it can be called with router_logits; False offers only ``.experts``.
        activations: names of the activations that it has (``MoEConfig.activation``).
        alphas: the values of ``MoEConfig.alpha`` that its "swiglu" takes; {1.0} is plain SwiGLU. None is any.
        limits: likewise of ``limit``; {None} is none.
        up_offsets: likewise of ``up_offset``; {0.0} is none.
        gate_up_layouts: how the rows of a gated gate_up_proj may lie (``MoEConfig.gate_up_layout``).
        biases: whether the projections may have biases.
        late_clamp: whether its "swiglu" may be clamped after the activation (``MoEConfig.clamp``).
        softcap: whether its "swiglu" may have caps (``MoEConfig.gate_softcap`` and ``up_softcap``).
        scorings: names of the scorings that it routes by (``MoEConfig.scoring``).
        renormalize_forms: how it lets the epsilon enter (``MoEConfig.renormalize_form``, R5).
        selection: whether it chooses experts by groups and with a selection bias (R2, R3).
        selection_keys: what it can add that bias to (``MoEConfig.selection_key``).
        expert_scale: whether its routing takes learned scales of the weights (R9).
        post_expert_norm: whether it normalises each expert's output (E8). An executor that was written before that form
            knows nothing of it, and would leave it out: so it has it only if it says so.
        scale_input: whether it has that form of weighting (C3).
        lora: whether it takes adapters.
        weights: the kinds of projections that it takes: "dense", "nf4", "fp4", "mxfp4".
        blocksizes: of "nf4" and "fp4".
        nested: of these, the segments that nested statistics of absmax may have: "one" for all experts, "per expert"
            (Q5). None of them is plain absmax.
        mixed: whether the two projections may be of different kinds: of those, or one of them dense (`takes`).
        batch_invariant: whether a token's output never depends on other tokens, to the last bit (C2).
        interpreted: whether an interpreter runs its kernels here: numbers as they will be, times that mean nothing.
    """

    devices: frozenset[str] = frozenset()
    dtypes: frozenset[str] = DTYPES
    backward: bool = True
    routing: bool = True
    activations: frozenset[str] = ACTIVATIONS
    late_clamp: bool = True
    softcap: bool = True
    scorings: frozenset[str] = SCORINGS
    renormalize_forms: frozenset[str] = RENORMALIZE_FORMS
    selection: bool = True
    selection_keys: frozenset[str] = SELECTION_KEYS
    expert_scale: bool = True
    post_expert_norm: bool = False
    scale_input: bool = True
    lora: bool = True
    weights: frozenset[str] = frozenset({"dense"})
    mixed: bool = False
    batch_invariant: bool = False
    interpreted: bool = False
    bias_dtypes: frozenset[str] = field(default=DTYPES, kw_only=True)
    router_logits_dtypes: frozenset[str] = field(default=DTYPES, kw_only=True)
    topk_weights_dtypes: frozenset[str] = field(default=DTYPES, kw_only=True)
    topk_ids_dtypes: frozenset[str] = field(default=ID_DTYPES, kw_only=True)
    lora_dtypes: frozenset[str] = field(default=DTYPES, kw_only=True)
    strided: frozenset[str] = field(default=STRIDED, kw_only=True)
    align_hidden: int = field(default=1, kw_only=True)
    align_intermediate: int = field(default=1, kw_only=True)
    empty_batch: bool = field(default=True, kw_only=True)
    empty_slots: bool = field(default=True, kw_only=True)
    duplicate_ids: bool = field(default=True, kw_only=True)
    alphas: frozenset[float] | None = field(default=None, kw_only=True)
    limits: frozenset[float | None] | None = field(default=None, kw_only=True)
    up_offsets: frozenset[float] | None = field(default=None, kw_only=True)
    gate_up_layouts: frozenset[str] = field(default=GATE_UP_LAYOUTS, kw_only=True)
    biases: bool = field(default=True, kw_only=True)
    blocksizes: frozenset[int] = field(default=BLOCKSIZES, kw_only=True)
    nested: frozenset[str] = field(default=NESTED, kw_only=True)

    def __post_init__(self) -> None:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        refuse_wrong(own)
        for name, value in own.items():
            if isinstance(value, set):  # so that it is hashable
                object.__setattr__(self, name, frozenset(value))

    def takes(self, gate_up: str, down: str) -> bool:
        """Whether it takes a layer whose projections are of these kinds.

        With ``mixed`` one of them may be dense although ``weights`` lacks "dense", which then says: never both.
        """
        if gate_up == down:
            return gate_up in self.weights
        return self.mixed and {gate_up, down} <= self.weights | {"dense"}


def check_norm(executor: Executor, weights: MoEWeights) -> None:
    """Raises Unsupported for a norm after each expert (E8) that the executor does not declare.

    Whoever calls an executor of another package asks this first: what it does not know of, it would leave out.
    """
    norm = weights.post_expert_norm
    if norm is not None and not getattr(getattr(executor, "capabilities", None), "post_expert_norm", False):
        name = getattr(executor, "name", type(executor).__name__)
        raise Unsupported(f"post_expert_norm.shape={tuple(norm.shape)}: must be None for {name}")


class Executor(Protocol):
    """A PyTorch implementation of the layer.

    An executor may also offer ``route(router_logits, weights) -> Routing`` (`RoutingExecutor`), and is then judged on
    its own ids.
    """

    @property
    def name(self) -> str:
        """The name under which it is registered."""

    @property
    def capabilities(self) -> Capabilities:
        """What it declares."""

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer.

        Args:
            x: [..., H], the dtype of the dense projections.
            router_logits: [..., E], any float dtype.
            weights: the layer's parameters, of any strides.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that this executor cannot take.
        """

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer with routing done elsewhere; ids outside [0, E) are empty slots.

        Args:
            x: [..., H], the dtype of the dense projections.
            topk_ids: [..., K], int32 or int64.
            topk_weights: [..., K], any float dtype.
            weights: the layer's parameters, of any strides.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that this executor cannot take.
        """

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported, naming argument, value, and what is allowed, where a call would."""


@runtime_checkable
class RoutingExecutor(Protocol):
    """An executor that tells which experts it chooses."""

    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        """topk_ids int64 (T1) and topk_weights, [..., K], for router_logits [..., E], as ``__call__`` uses them."""


@runtime_checkable
class NotingExecutor(Protocol):
    """An executor that has something to say of a call that works."""

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of such a call, in one line, or ""."""
