"""The common pipeline (`executors._pipeline.layer`) as an operator's implementation, with a way to multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from executors._base.arguments import Arguments
from executors._base.operator import Kept, owners_of
from executors._pipeline import layer as _layer
from executors._pipeline.grouping import group
from executors._pipeline.layer import Layer
from executors._pipeline.packed_matrices import PackedMatrices, room_for
from executors._pipeline.products import Matrices, Products, stored_dtype
from executors._pipeline.tangent import tangent
from moe_ref.types import PARAMETERS, PackedTensor

Stacks = tuple[Tensor | PackedTensor, Tensor | PackedTensor]


class PipelineOperator(NamedTuple):
    """A way to multiply rows by their expert's matrix.

    Attributes:
        name: of the operator.
        products: makes the products from the group offsets, as ``keep`` left them.
        on_host: whether the products want the group offsets on the host: one synchronisation per forward pass.
    """

    name: str
    products: Callable[[Tensor], Products]
    on_host: bool

    @property
    def gradient_format(self) -> torch.memory_format:
        """Gradients of parameters are stored as those are: autograd would copy others into that order."""
        return torch.preserve_format

    def forward(self, given: Arguments, keep_z: bool, keep_decoded: bool) -> tuple[Tensor, Kept]:
        """y [T, H]; of both projections what was decoded is kept too, or nothing."""
        slots = given.topk_ids.numel() if keep_decoded else 0
        stacks = given.matrices()
        rooms = [room_for(stack, slots, given.x) for stack in stacks]
        matrices = _matrices(stacks, rooms, filled=False)
        order, group_offsets = group(given.topk_ids, matrices[0].shape[0])
        offsets = group_offsets.cpu() if self.on_host else group_offsets
        y, z = _layer.forward(_make_layer(given, order, offsets, matrices), self.products(offsets))
        return y, Kept(z if keep_z else z.new_empty(0, z.shape[1]), order, offsets, *rooms)

    def fake(self, given: Arguments, keep_z: bool, keep_decoded: bool) -> tuple[Tensor, Kept]:
        """Tensors of the same shapes."""
        x, slots = given.x, given.topk_ids.numel()
        stacks = given.matrices()
        experts, both = stacks[0].shape[:2]
        device = torch.device("cpu") if self.on_host else x.device
        return x.new_empty(x.shape), Kept(
            x.new_empty(slots if keep_z else 0, both, dtype=stored_dtype(x.dtype)),
            given.topk_ids.new_empty(slots, dtype=torch.int64),
            torch.empty(experts + 1, dtype=torch.int64, device=device),
            *(room_for(stack, slots if keep_decoded else 0, x) for stack in stacks),
        )

    def backward(self, given: Arguments, kept: Kept, dy: Tensor, needs: dict[str, bool]) -> dict[str, Tensor]:
        """The gradients that are needed."""
        matrices = _matrices(given.matrices(), [kept.decoded_gate_up, kept.decoded_down], filled=True)
        layer = _make_layer(given, kept.order, kept.group_offsets, matrices)
        multiply = self.products(kept.group_offsets)
        z = kept.z
        if not z.shape[0]:  # nothing was kept: the same products give the same bits (D4)
            z = _layer.preactivations(layer, multiply)
        found = _layer.backward(layer, multiply, z, dy, needs)
        owners = owners_of(given)
        return {name: _stored_as(owners[name], gradient, name in PARAMETERS) for name, gradient in found.items()}

    def tangent(self, given: Arguments, tangents: dict[str, Tensor]) -> Tensor:
        """The tangent of y; what is in 4 bits is decoded for each product anew."""
        stacks = given.matrices()
        matrices = _matrices(stacks, [room_for(stack, 0, given.x) for stack in stacks], filled=False)
        order, group_offsets = group(given.topk_ids, matrices[0].shape[0])
        offsets = group_offsets.cpu() if self.on_host else group_offsets
        return tangent(_make_layer(given, order, offsets, matrices), self.products(offsets), tangents)


def _stored_as(owner: Tensor | None, gradient: Tensor, parameter: bool) -> Tensor:
    """The gradient in the order of memory that is promised: that of its owner if it is a parameter, else contiguous."""
    assert owner is not None
    order = torch.preserve_format if parameter else torch.contiguous_format
    wanted = torch.empty_like(owner, device="meta", memory_format=order).stride()
    if gradient.stride() == wanted:
        return gradient
    return gradient.new_empty_strided(gradient.shape, wanted).copy_(gradient)


def _matrices(stacks: Stacks, rooms: list[Tensor], filled: bool) -> list[Matrices]:
    """What products take: a dense stack as it is, or one in 4 bits with the room for what is decoded of it."""
    return [
        PackedMatrices(stack, room, filled and room.shape[0] > 0) if isinstance(stack, PackedTensor) else stack
        for stack, room in zip(stacks, rooms, strict=True)
    ]


def _make_layer(given: Arguments, order: Tensor, group_offsets: Tensor, matrices: list[Matrices]) -> Layer:
    slots = given.x, given.topk_ids, given.topk_weights, order, group_offsets
    return Layer(*slots, *given.projections(*matrices), given.act(), given.scale_input, given.norm())
