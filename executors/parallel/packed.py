"""Projections in 4 bits by rank: codes as views, and their statistics with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from executors.nf4.convert import unnest
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor


def part_of(name: str, tensor: PackedTensor, experts: range) -> PackedTensor:
    """Some consecutive experts of a projection.

    Raises:
        ValueError: in one line: a block of codes straddles two experts.
    """
    if isinstance(tensor, MXFP4Tensor):
        return tensor.map(lambda array: array[experts.start : experts.stop])
    assert isinstance(tensor, NF4Tensor)
    each = tensor.size // tensor.shape[0]
    if each % tensor.blocksize and len(experts) not in (0, tensor.shape[0]):
        allowed = f"must be a multiple of blocksize={tensor.blocksize}, or else blocks would straddle ranks"
        raise ValueError(f"{name} has {each} numbers of an expert: {allowed}")
    blocks, segments = -(-each // tensor.blocksize), tensor.segments
    whole = segments == tensor.shape[0]  # each expert has its own nested statistics
    if tensor.nested_absmax is not None and not whole:
        tensor = unnest(tensor)
    cut = replace(
        tensor,
        packed=tensor.packed[experts.start * each // 2 : (experts.stop * each + 1) // 2],
        absmax=tensor.absmax[experts.start * blocks : experts.stop * blocks],
        shape=(len(experts), *tensor.shape[1:]),
    )
    if tensor.nested_absmax is None:
        return cut
    nested = -(-blocks // tensor.nested_blocksize)
    return replace(
        cut,
        nested_absmax=tensor.nested_absmax[experts.start * nested : experts.stop * nested],
        nested_offset=tensor.nested_offset.reshape(-1)[experts.start : experts.stop],  # type: ignore[union-attr]
    )


def joined(tensor: PackedTensor, num_experts: int, pieces: Callable[[Tensor], list[Tensor]]) -> PackedTensor:
    """The experts of all ranks.

    Args:
        tensor: this rank's.
        num_experts: E of all ranks.
        pieces: gives all ranks' arrays for this rank's.
    """
    arrays = tensor.arrays()
    shared = {"nested_code"} & arrays.keys()
    changed = {name: torch.cat(pieces(array)) for name, array in arrays.items() if name not in shared}
    if isinstance(tensor, NF4Tensor):
        return replace(tensor, **changed, shape=(num_experts, *tensor.shape[1:]))  # type: ignore[arg-type]
    assert isinstance(tensor, MXFP4Tensor)
    return replace(tensor, **changed)  # type: ignore[arg-type]
