"""A projection in 4 bits on its way through a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors._decode import decode_expert, decode_experts
from moe_ref.types import PackedTensor


class PackedMatrices(NamedTuple):
    """Matrices [E, m, k] that are decoded when they are used.

    Experts that have rows are counted by places, in increasing order of their numbers.

    Attributes:
        packed: the codes.
        decoded: [places, ...] in the order in which the codes are stored: room to keep what is decoded, or of no place.
        filled: whether ``decoded`` holds it already: the backward pass of a call that kept it.
    """

    packed: PackedTensor
    decoded: Tensor
    filled: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, m, k)."""
        return self.packed.shape

    def expert(self, number: int, place: int) -> Tensor:
        """[m, k] One expert that has rows."""
        if self.filled:
            return self._read(self.decoded[place])
        matrix = decode_expert(self.packed, number)
        if self.decoded.shape[0]:
            self._read(self.decoded[place]).copy_(matrix)
        return matrix

    def experts(self, numbers: Tensor, places: slice) -> Tensor:
        """[n, m, k] Several experts, whose numbers only the device knows."""
        if self.filled:
            return self._read(self.decoded[places])
        matrices = decode_experts(self.packed, numbers)
        if self.decoded.shape[0]:
            self._read(self.decoded[places]).copy_(matrices)
        return matrices

    def _read(self, stored: Tensor) -> Tensor:
        return stored.transpose(-1, -2) if self.packed.transposed else stored


def room_for(stack: Tensor | PackedTensor, slots: int | torch.SymInt, like: Tensor) -> Tensor:
    """Room for all experts in 4 bits that so many slots can name; a CPU takes memory only where it is written."""
    if isinstance(stack, Tensor):
        return like.new_empty(0)
    experts = torch.sym_min(stack.shape[0], slots)  # type: ignore[no-untyped-call]
    return like.new_empty(experts, *stack.stored_shape[1:])
