"""Activations in torch, forward and backward, evaluated in at least fp32 (clauses E1, E2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """The parts of ``MoEConfig`` that shape the activation."""

    alpha: float
    limit: float | None
    up_offset: float
    layout: str


def forward(z: Tensor, act: Activation) -> Tensor:
    """h [n, I] from z [n, 2I], in z's dtype: (clamp(u) + up_offset) * g' * sigmoid(alpha g')."""
    gate, up = _split(z, act)
    if act.limit is not None:
        gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    return ((up + act.up_offset) * gate * torch.sigmoid(act.alpha * gate)).to(z.dtype)


def backward(z: Tensor, dh: Tensor, act: Activation) -> Tensor:
    """dz [n, 2I] from z and dh [n, I], in at least fp32; the clamp's derivative at equality is 1."""
    gate, up = _split(z, act)
    limit = math.inf if act.limit is None else act.limit
    clamped_gate, clamped_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(act.alpha * clamped_gate)
    slope = s * (1 + act.alpha * clamped_gate * (1 - s))
    d_gate = (dh * (clamped_up + act.up_offset) * slope).masked_fill(gate > limit, 0.0)
    d_up = (dh * clamped_gate * s).masked_fill(up.abs() > limit, 0.0)
    if act.layout == "interleaved":
        return torch.stack((d_gate, d_up), dim=-1).flatten(-2)
    return torch.cat((d_gate, d_up), dim=-1)


def _split(z: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if act.layout == "interleaved":
        return z[:, 0::2], z[:, 1::2]
    gate, up = z.chunk(2, dim=-1)
    return gate, up
