"""A call's arguments as an operator of torch has them: tensors, lists of tensors, and what is static.

A projection is a tensor, a list of tensors and a list of integers there: a dense stack is the tensor alone, one in 4
bits has codes, scales and a format. The format is integers: torch.compile may make symbols of them, which it cannot
write into a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args

from torch import Tensor

from moe_ref.types import GATED, PARAMETERS, MoEWeights, MXFP4Tensor, NF4Tensor, PackedTensor, QuantType
from moe_ref.validation import dtype_name

DENSE = 0
KINDS = (*get_args(QuantType), "mxfp4")  # of 4 bits, numbered from 1
OWN = (*PARAMETERS, "post_expert_norm")  # the layer's tensors that may need a gradient
NAMES = ("x", "topk_weights", *OWN)  # what may need a gradient
TENSORS = 3 + len(OWN)  # arguments that are tensors, before the two lists of scales

Matrices = TypeVar("Matrices")


class Activation(NamedTuple):
    """The parts of ``MoEConfig`` that shape the activation."""

    name: str
    alpha: float
    limit: float | None
    up_offset: float
    layout: str  # "" where there is no gate
    clamp: str = "before"
    gate_softcap: float | None = None
    up_softcap: float | None = None

    @property
    def has_softcap(self) -> bool:
        """Whether a half has a cap."""
        return self.gate_softcap is not None or self.up_softcap is not None


class Norm(NamedTuple):
    """The norm of each expert's output: its factor [H] and epsilon."""

    factor: Tensor
    eps: float


class Projection(NamedTuple, Generic[Matrices]):
    """A projection's parameters: matrices [E, m, k], bias [E, m], adapter factors [E, r, k] and [E, m, r]."""

    matrices: Matrices
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float


class Arguments(NamedTuple):
    """A call's arguments, in the order of the operator's schema.

    Attributes:
        x: [T, H].
        topk_ids, topk_weights: [T, K].
        gate_up_proj, down_proj: stacks [E, m, k], or codes in 4 bits.
        gate_up_proj_bias, down_proj_bias: [E, m].
        gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b: an adapter's factors, [E, r, k] and [E, m, r].
        post_expert_norm: [H], the factor of the norm of each expert's output.
        gate_up_scales, down_scales: of projections in 4 bits.
        gate_up_format, down_format: `DENSE`, or what `unflatten` needs beside codes and scales.
        gate_up_scaling, down_scaling: of adapters.
        scale_input, activation, alpha, limit, up_offset, layout, clamp, gate_softcap, up_softcap, post_expert_norm_eps:
            as in ``MoEConfig``.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None
    gate_up_lora_a: Tensor | None
    gate_up_lora_b: Tensor | None
    down_lora_a: Tensor | None
    down_lora_b: Tensor | None
    post_expert_norm: Tensor | None
    gate_up_scales: list[Tensor]
    down_scales: list[Tensor]
    gate_up_format: list[int]
    down_format: list[int]
    gate_up_scaling: float
    down_scaling: float
    scale_input: bool
    activation: str
    alpha: float
    limit: float | None
    up_offset: float
    layout: str
    clamp: str
    gate_softcap: float | None
    up_softcap: float | None
    post_expert_norm_eps: float

    def tensors(self) -> list[Tensor | None]:
        """All tensors, the scales last."""
        first: Any = self[:TENSORS]
        return [*first, *self.gate_up_scales, *self.down_scales]

    def with_tensors(self, tensors: Sequence[Any]) -> Arguments:
        """The same call with other tensors, in the order of `tensors`."""
        scales, split, static = list(tensors[TENSORS:]), len(self.gate_up_scales), self[TENSORS + 2 :]
        return Arguments._make([*tensors[:TENSORS], scales[:split], scales[split:], *static])

    def matrices(self) -> tuple[Tensor | PackedTensor, Tensor | PackedTensor]:
        """Both projections' matrices."""
        return (
            unflatten(self.gate_up_proj, self.gate_up_scales, self.gate_up_format, self.x),
            unflatten(self.down_proj, self.down_scales, self.down_format, self.x),
        )

    def projections(self, gate_up: Matrices, down: Matrices) -> tuple[Projection[Matrices], Projection[Matrices]]:
        """Both projections, around the matrices that a pipeline has made of them."""
        factors = (self.gate_up_lora_a, self.gate_up_lora_b), (self.down_lora_a, self.down_lora_b)
        return (
            Projection(gate_up, self.gate_up_proj_bias, *factors[0], self.gate_up_scaling),
            Projection(down, self.down_proj_bias, *factors[1], self.down_scaling),
        )

    def norm(self) -> Norm | None:
        """The norm of each expert's output, if there is one."""
        return None if self.post_expert_norm is None else Norm(self.post_expert_norm, self.post_expert_norm_eps)

    def act(self) -> Activation:
        """The activation."""
        layout = self.layout if self.activation in GATED else ""
        return Activation(
            self.activation,
            self.alpha,
            self.limit,
            self.up_offset,
            layout,
            self.clamp,
            self.gate_softcap,
            self.up_softcap,
        )


def arguments_of(rows: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Arguments:
    """The arguments for rows [T, H] with their slots [T, K]."""
    config, lora = weights.config, weights.lora
    scalings = (1.0, 1.0) if lora is None else (float(lora.gate_up_scaling), float(lora.down_scaling))
    act = (config.activation, float(config.alpha), config.limit, float(config.up_offset), config.gate_up_layout)
    forms = (config.clamp, config.gate_softcap, config.up_softcap, float(config.post_expert_norm_eps))
    gate_up, gate_up_scales, gate_up_format = flatten(weights.gate_up_proj)
    down, down_scales, down_format = flatten(weights.down_proj)
    parameters = weights.parameters() | {"gate_up_proj": gate_up, "down_proj": down}
    tensors = [rows, topk_ids, topk_weights, *(parameters.get(name) for name in OWN)]
    static = gate_up_format, down_format, *scalings, config.scale_input, *act, *forms
    return Arguments._make([*tensors, gate_up_scales, down_scales, *static])


def flatten(projection: Any) -> tuple[Tensor, list[Tensor], list[int]]:
    """The stack or the codes, the scales, and the format of a Tensor or a `PackedTensor` [E, m, k]."""
    if not isinstance(projection, PackedTensor):
        return projection, [], [DENSE]
    codes, *scales = (array.detach() for array in projection.arrays().values())  # frozen, whatever a module made of it
    kind = 1 + KINDS.index(projection.quant_type)
    static = [kind, int(projection.transposed)]
    if isinstance(projection, NF4Tensor):
        static += [projection.blocksize, projection.nested_blocksize, *projection.shape]
    return codes, scales, static


def unflatten(stack: Tensor, scales: list[Tensor], form: list[int], x: Tensor) -> Tensor | PackedTensor:
    """The projection of which `flatten` made these arguments; one in 4 bits decodes to x's dtype."""
    kind, *static = form
    if kind == DENSE:
        return stack
    transposed, *static = static
    stored: dict[str, Any] = {"dtype": dtype_name(x), "transposed": bool(transposed)}
    if not static:
        return MXFP4Tensor(stack, *scales, **stored)
    blocksize, nested_blocksize, *shape = static
    return NF4Tensor(
        stack,
        *scales,
        shape=tuple(shape),
        quant_type=KINDS[kind - 1],
        blocksize=blocksize,
        nested_blocksize=nested_blocksize,
        **stored,
    )
