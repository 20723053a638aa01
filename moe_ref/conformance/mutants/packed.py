"""4 bits misread: codes, scales, and nested statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ref.conformance.mutants._registry import MXFP4, NF4, packed_mutant
from moe_ref.conformance.wrapped import experts
from moe_ref.mxfp4 import BLOCKSIZE
from moe_ref.nf4 import absmax_of
from moe_ref.types import MoEWeights, NF4Tensor, PackedTensor

if TYPE_CHECKING:
    from executors import Executor


def changed(weights: MoEWeights, change: Callable[[Any], PackedTensor], kind: type = PackedTensor) -> MoEWeights:
    """The layer with projections of one kind changed, and others as they are."""
    packed = weights.packed()
    return weights.with_parameters({name: change(t) if isinstance(t, kind) else t for name, t in packed.items()})


def _changed(weights: MoEWeights, change: Callable[[NF4Tensor], NF4Tensor]) -> MoEWeights:
    return changed(weights, change, NF4Tensor)


def _unnested(tensor: NF4Tensor) -> NF4Tensor:
    """The same numbers with plain absmax."""
    return replace(tensor, absmax=absmax_of(tensor), nested_absmax=None, nested_code=None, nested_offset=None)


@packed_mutant(*NF4, *MXFP4)
def nibbles_swapped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The nibbles of a byte are swapped (Q1, M1)."""

    def wrong(tensor: PackedTensor) -> PackedTensor:
        codes = (tensor.codes << 4) | (tensor.codes >> 4)
        return replace(tensor, **{tensor.NAMES[0]: codes})  # type: ignore[type-var]

    return experts(inner, x, ids, w, changed(weights, wrong))


@packed_mutant(*NF4, *MXFP4)
def stored_order_mistaken(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The flag of transposed storage is read as its opposite (Q1, M1)."""

    def wrong(tensor: PackedTensor) -> PackedTensor:
        if isinstance(tensor, NF4Tensor):
            return replace(tensor, transposed=not tensor.transposed)
        rows = (tensor.shape[0], tensor.stored_shape[2], tensor.stored_shape[1] // BLOCKSIZE)
        blocks, scales = (tensor.arrays()[name] for name in tensor.NAMES)
        turned = {"blocks": blocks.reshape(*rows, -1), "scales": scales.reshape(rows)}
        return replace(tensor, **turned, transposed=not tensor.transposed)  # type: ignore[type-var]

    return experts(inner, x, ids, w, changed(weights, wrong))


@packed_mutant(*NF4)
def table_mistaken(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """NF4's codes are read as FP4's, or the other way round (Q1)."""
    other = {"nf4": "fp4", "fp4": "nf4"}
    wrong = _changed(weights, lambda t: replace(t, quant_type=other[t.quant_type]))  # type: ignore[arg-type]
    return experts(inner, x, ids, w, wrong)


@packed_mutant(*NF4)
def absmax_of_next_block(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each block has the scale of the next (Q2)."""
    wrong = _changed(weights, lambda t: replace(t, absmax=t.absmax.roll(-1)))
    return experts(inner, x, ids, w, wrong)


@packed_mutant(*NF4)
def last_block_of_expert_mistaken(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last rows of each expert have the scale of the preceding block (Q2)."""

    def wrong(tensor: NF4Tensor) -> NF4Tensor:
        tensor = _unnested(tensor)
        size = tensor.size // tensor.shape[0]
        ends = torch.arange(1, tensor.shape[0] + 1, device=tensor.device) * size - 1
        absmax = tensor.absmax.clone()
        absmax[ends // tensor.blocksize] = tensor.absmax[(ends // tensor.blocksize - 1).clamp(min=0)]
        return replace(tensor, absmax=absmax)

    return experts(inner, x, ids, w, _changed(weights, wrong))


@packed_mutant(*NF4)
def absmax_in_bf16(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Scales are rounded to bf16 (Q2)."""

    def wrong(tensor: NF4Tensor) -> NF4Tensor:
        tensor = _unnested(tensor)
        return replace(tensor, absmax=tensor.absmax.bfloat16().float())

    return experts(inner, x, ids, w, _changed(weights, wrong))


@packed_mutant(*NF4)
def decoded_in_fp32(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Decoded numbers are not rounded to their own dtype before the products (Q2)."""
    if x.dtype == torch.float32:
        return experts(inner, x, ids, w, weights)
    wide = _changed(weights, lambda t: replace(t, dtype="float32"))
    return experts(inner, x.float(), ids, w, wide).to(x.dtype)


@packed_mutant(*NF4)
def nested_offset_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The offset of nested statistics is not added (Q3)."""

    def wrong(tensor: NF4Tensor) -> NF4Tensor:
        offset = tensor.nested_offset
        return tensor if offset is None else replace(tensor, nested_offset=torch.zeros_like(offset))

    return experts(inner, x, ids, w, _changed(weights, wrong))


@packed_mutant(*NF4)
def nested_scales_fused(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Product and offset of nested statistics are rounded once, as by a fused multiply-add (Q3)."""

    def wrong(tensor: NF4Tensor) -> NF4Tensor:
        if tensor.nested_code is None or tensor.nested_absmax is None or tensor.nested_offset is None:
            return tensor
        blocks = torch.arange(len(tensor.absmax), device=tensor.device)
        own = len(tensor.absmax) // tensor.segments
        nested = blocks // own * -(-own // tensor.nested_blocksize) + blocks % own // tensor.nested_blocksize
        codes, scales = tensor.nested_code[tensor.absmax.long()].double(), tensor.nested_absmax[nested].double()
        offsets = tensor.nested_offset.reshape(-1)[blocks // own].double()
        return replace(_unnested(tensor), absmax=(codes * scales + offsets).float())

    return experts(inner, x, ids, w, _changed(weights, wrong))


@packed_mutant(*NF4)
def offset_of_first_expert_for_all(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Experts that were quantised one by one are joined under the first one's offset (Q5)."""

    def wrong(tensor: NF4Tensor) -> NF4Tensor:
        offset = tensor.nested_offset
        if offset is None or not offset.ndim:
            return tensor
        return replace(tensor, nested_offset=offset[:1].expand_as(offset).contiguous())

    return experts(inner, x, ids, w, _changed(weights, wrong))


@packed_mutant(*NF4, *MXFP4)
def codes_changed_in_place(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Packed bytes are rearranged after use (E4)."""
    y = experts(inner, x, ids, w, weights)
    for tensor in weights.packed().values():
        tensor.codes.data[:1] += 1
    return y
