"""What `Capabilities` can leave out, word by word: executors that get it wrong, and a problem that shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import executors
from executors import Capabilities, Executor
from moe_ref.conformance.mutants.routing import logits_in_bf16
from moe_ref.conformance.mutants.slots import empty_slot_counts, ids_read_as_int32, weights_in_bf16
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.wrapped import Declaring, LayerChange, SlotChange, configured, experts
from moe_ref.types import LORA_FACTORS, MoEConfig, MoEWeights, NF4Tensor

BASE = Problem(9, 5, 24, 40, MoEConfig(2), entry="experts", seed=3)
IN_NF4 = replace(BASE, quant_type="nf4", hidden=32, intermediate=64)
UNIT = 16


@dataclass(frozen=True)
class Word:
    """A field of `Capabilities`.

    Attributes:
        less: values of fields with which it promises less than by default.
        problem: one that needs what is left out.
        slots, layer: how an executor gets that wrong, and nothing else.
        raises: what it raises, if it gives no numbers.
    """

    less: dict[str, Any]
    problem: Problem
    slots: SlotChange | None = None
    layer: LayerChange | None = None
    raises: type[Exception] | None = None

    def executor(self, less: bool, wrong: bool = True) -> Declaring:
        """Native or grouped_nf4, declaring all or less, and wrong about what is less or not."""
        inner = executors.get("grouped_nf4" if self.problem.quant_type else "native")
        able = replace(inner.capabilities, **(self.less if less else {}))
        changes = {"slots": self.slots, "layer": self.layer} if wrong else {}
        return Declaring("wrong" if wrong else "right", inner, declared=able, **changes)


def with_config(
    changes: dict[str, Any], inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights
) -> Tensor:
    """Ignores a part of the configuration."""
    own = changes if weights.config.gated else {}
    return experts(inner, x, ids, w, configured(weights, **own))


def with_parameters(
    names: tuple[str, ...],
    change: Callable[[Tensor], Tensor],
    inner: Executor,
    x: Tensor,
    ids: Tensor,
    w: Tensor,
    weights: MoEWeights,
) -> Tensor:
    """Reads some parameters in another way."""
    own = {name: change(value) for name, value in weights.parameters().items() if name in names}
    return experts(inner, x, ids, w, weights.with_parameters(own))


def with_nf4(
    change: Callable[[NF4Tensor], NF4Tensor], inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights
) -> Tensor:
    """Reads projections in NF4 and FP4 in another way."""
    own = {name: change(value) for name, value in weights.packed().items() if isinstance(value, NF4Tensor)}
    return experts(inner, x, ids, w, weights.with_parameters(own))


def without_biases(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Ignores biases, whose gradients are zeros."""
    own = {n: v * 0 for n, v in weights.parameters().items() if n in ("gate_up_proj_bias", "down_proj_bias")}
    return experts(inner, x, ids, w, weights.with_parameters(own))


def as_contiguous(value: Tensor) -> Tensor:
    """What stands in memory where a contiguous tensor would."""
    strides = torch.empty(value.shape, device="meta").stride()
    last = value.storage_offset() + value.numel()
    if value.is_contiguous() or last > value.untyped_storage().nbytes() // value.element_size():
        return value
    return value.as_strided(value.shape, strides, value.storage_offset())


def x_as_contiguous(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, as_contiguous(x), ids, w, weights)


def weights_of_slots_as_contiguous(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, x, ids, as_contiguous(w), weights)


def tail_of_hidden_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Adds whole tiles of H alone."""
    kept = torch.arange(x.shape[1], device=x.device) < x.shape[1] // UNIT * UNIT
    return experts(inner, x * kept, ids, w, weights)


def tail_of_intermediate_dropped(value: Tensor) -> Tensor:
    """Adds whole tiles of I alone."""
    return value * (torch.arange(value.shape[2], device=value.device) < value.shape[2] // UNIT * UNIT)


def fails_without_tokens(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Launches an empty grid."""
    if not len(x):
        raise RuntimeError("invalid configuration argument")
    return experts(inner, x, ids, w, weights)


def duplicates_count_once(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """An expert that a token has twice overwrites its first result."""
    later = [(ids[:, k + 1 :] == ids[:, k : k + 1]).any(1) for k in range(ids.shape[1])]
    return experts(inner, x, ids.masked_fill(torch.stack(later, 1), -1), w, weights)


def scales_of_64(tensor: NF4Tensor) -> NF4Tensor:
    """Finds the scale of a block of another size where one of 64 would have it."""
    return tensor if tensor.blocksize == 64 else replace(tensor, absmax=tensor.absmax.roll(1))


def offset_of_the_first(tensor: NF4Tensor) -> NF4Tensor:
    """Adds the first expert's offset to all scales."""
    if tensor.nested_offset is None or not tensor.nested_offset.ndim:
        return tensor
    return replace(tensor, nested_offset=tensor.nested_offset[:1].expand_as(tensor.nested_offset).contiguous())


def offset_forgotten(tensor: NF4Tensor) -> NF4Tensor:
    return tensor if tensor.nested_offset is None else replace(tensor, nested_offset=0 * tensor.nested_offset)


def in_bf16(value: Tensor) -> Tensor:
    return value.bfloat16().to(value.dtype)


EVERY_PARAMETER = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias", *LORA_FACTORS)
BIASES: dict[str, Any] = {"gate_up_bias": True, "down_bias": True}
SHARP = (("gate_up_proj", 2),)
WORDS = {
    "alphas": Word(
        {"alphas": frozenset({1.0})},
        replace(BASE, config=MoEConfig(2, alpha=1.702)),
        partial(with_config, {"alpha": 1.0}),
    ),
    "limits": Word(
        {"limits": frozenset({None}), "late_clamp": False},
        replace(BASE, config=MoEConfig(2, limit=1.0), powers=SHARP),
        partial(with_config, {"limit": None, "clamp": "before"}),
    ),
    "up_offsets": Word(
        {"up_offsets": frozenset({0.0})},
        replace(BASE, config=MoEConfig(2, up_offset=1.0)),
        partial(with_config, {"up_offset": 0.0}),
    ),
    "gate_up_layouts": Word(
        {"gate_up_layouts": frozenset({"concatenated"})},
        replace(BASE, config=MoEConfig(2, gate_up_layout="interleaved")),
        partial(with_config, {"gate_up_layout": "concatenated"}),
    ),
    "biases": Word({"biases": False}, replace(BASE, **BIASES), without_biases),
    "bias_dtypes": Word(
        {"bias_dtypes": frozenset({"bfloat16"})},
        replace(BASE, **BIASES),
        partial(with_parameters, ("gate_up_proj_bias", "down_proj_bias"), in_bf16),
    ),
    "router_logits_dtypes": Word(
        {"router_logits_dtypes": frozenset({"bfloat16"})}, replace(BASE, entry="layer"), layer=logits_in_bf16
    ),
    "topk_weights_dtypes": Word(
        {"topk_weights_dtypes": frozenset({"bfloat16"}), "routing": False}, BASE, weights_in_bf16
    ),
    "topk_ids_dtypes": Word(
        {"topk_ids_dtypes": frozenset({"int32"}), "routing": False},
        replace(BASE, tokens=33, empty_slots=True),
        ids_read_as_int32,
    ),
    "lora_dtypes": Word(
        {"lora_dtypes": frozenset({"bfloat16"})},
        replace(BASE, gate_up_rank=4, down_rank=4),
        partial(with_parameters, LORA_FACTORS, in_bf16),
    ),
    "strided x": Word(
        {"strided": frozenset({"routing", "weights"})}, replace(BASE, x_layout="sliced"), x_as_contiguous
    ),
    "strided routing": Word(
        {"strided": frozenset({"x", "weights"}), "routing": False},
        replace(BASE, routing_layout="sliced"),
        weights_of_slots_as_contiguous,
    ),
    "strided weights": Word(
        {"strided": frozenset({"x", "routing"})},
        replace(BASE, weights_layout="transposed"),
        partial(with_parameters, EVERY_PARAMETER, as_contiguous),
    ),
    "align_hidden": Word({"align_hidden": UNIT}, BASE, tail_of_hidden_dropped),
    "align_intermediate": Word(
        {"align_intermediate": UNIT}, BASE, partial(with_parameters, ("down_proj",), tail_of_intermediate_dropped)
    ),
    "empty_batch": Word({"empty_batch": False}, replace(BASE, tokens=0), fails_without_tokens, raises=RuntimeError),
    "empty_slots": Word({"empty_slots": False, "routing": False}, replace(BASE, empty_slots=True), empty_slot_counts),
    "duplicate_ids": Word({"duplicate_ids": False}, replace(BASE, cut_points=True), duplicates_count_once),
    "blocksizes": Word({"blocksizes": frozenset({64})}, replace(IN_NF4, blocksize=32), partial(with_nf4, scales_of_64)),
    "nested": Word({"nested": frozenset()}, replace(IN_NF4, nested="one"), partial(with_nf4, offset_forgotten)),
    "nested per expert": Word(
        {"nested": frozenset({"one"})}, replace(IN_NF4, nested="per expert"), partial(with_nf4, offset_of_the_first)
    ),
}

PLAIN = Capabilities(  # what a kernel for plain SwiGLU in bf16 takes, whose routing is done elsewhere
    dtypes=frozenset({"bfloat16"}),
    routing=False,
    selection=False,
    activations=frozenset({"swiglu"}),
    late_clamp=False,
    softcap=False,
    scale_input=False,
    lora=False,
    expert_scale=False,
    bias_dtypes=frozenset({"x"}),
    topk_weights_dtypes=frozenset({"float32"}),
    topk_ids_dtypes=frozenset({"int64"}),
    strided=frozenset(),
    align_hidden=UNIT,
    align_intermediate=UNIT,
    empty_batch=False,
    empty_slots=False,
    duplicate_ids=False,
    alphas=frozenset({1.0}),
    limits=frozenset({None}),
    up_offsets=frozenset({0.0}),
    gate_up_layouts=frozenset({"concatenated"}),
    biases=False,
)
