"""Activations in torch, forward and backward, evaluated in at least fp32 (clauses E1, E2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """The parts of ``MoEConfig`` that shape the activation."""

    name: str
    alpha: float
    limit: float | None
    up_offset: float
    layout: str

    @property
    def gated(self) -> bool:
        """Whether z holds gate and up halves."""
        return self.name in ("swiglu", "geglu", "geglu_tanh")

    @property
    def plain(self) -> bool:
        """Whether the gate is an activation of torch's own, and nothing is clamped or added."""
        return self.alpha == 1.0 and self.limit is None and self.up_offset == 0.0


def forward(z: Tensor, act: Activation) -> Tensor:
    """h [n, I] from z [n, J], in z's dtype."""
    if not act.gated:
        return _plain(z, act.name)
    gate, up = _split(z, act.layout)
    if act.plain:  # torch evaluates in fp32 within each of the two: act(g) and h are rounded once each
        return _plain(gate, act.name) * up
    gate, up = _clamp(_widen(gate), _widen(up), act)
    return ((up + act.up_offset) * gate * torch.sigmoid(act.alpha * gate)).to(z.dtype)


def backward(z: Tensor, dh: Tensor, act: Activation) -> Tensor:
    """dz [n, J] from z [n, J] and dh [n, I], in at least fp32; the clamp's derivative at equality is 1."""
    if not act.gated:
        return dh * _value_and_slope(_widen(z), act)[1]
    gate, up = (_widen(half) for half in _split(z, act.layout))
    clamped_gate, clamped_up = _clamp(gate, up, act)
    value, slope = _value_and_slope(clamped_gate, act)
    factor = clamped_up + act.up_offset if act.up_offset else clamped_up
    d_gate, d_up = slope.mul_(factor).mul_(dh), value.mul_(dh)
    if act.limit is not None:
        d_gate.masked_fill_(gate > act.limit, 0.0)
        d_up.masked_fill_(up.abs() > act.limit, 0.0)
    if act.layout == "interleaved":
        return torch.stack((d_gate, d_up), dim=-1).flatten(-2)
    return torch.cat((d_gate, d_up), dim=-1)


def _plain(gate: Tensor, name: str) -> Tensor:
    if name in ("swiglu", "silu"):
        return F.silu(gate)
    if name == "relu2":
        return F.relu(gate).square()
    return F.gelu(gate, approximate="none" if name in ("geglu", "gelu") else "tanh")


def _value_and_slope(gate: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """act(g) and its derivative."""
    if act.name in ("swiglu", "silu"):
        s = torch.sigmoid(act.alpha * gate if act.alpha != 1.0 else gate)
        value = gate * s
        return value, s * (1 + act.alpha * gate * (1 - s))
    if act.name == "relu2":
        positive = F.relu(gate)
        return positive.square(), 2 * positive
    approximate = "none" if act.name in ("geglu", "gelu") else "tanh"
    slope = torch.ops.aten.gelu_backward(torch.ones_like(gate), gate, approximate=approximate)
    return F.gelu(gate, approximate=approximate), slope


def _clamp(gate: Tensor, up: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    if act.limit is None:
        return gate, up
    return gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)


def _split(z: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    if layout == "interleaved":
        return z[:, 0::2], z[:, 1::2]
    gate, up = z.chunk(2, dim=-1)
    return gate, up


def _widen(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
