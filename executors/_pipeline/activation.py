"""Activations in torch, forward and backward, evaluated in at least fp32 (clauses E1, E2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from executors._base.arguments import Activation
from executors._pipeline.halves import join, split, split_wide

BLOCK_ELEMENTS = 2**17  # of z: half a MiB in fp32


def forward(z: Tensor, act: Activation) -> Tensor:
    """h [n, I] from z [n, J], in z's dtype."""
    h = z.new_empty(z.shape[0], z.shape[1] // (2 if act.layout else 1))
    for rows in row_blocks(z):
        h[rows] = _forward(z[rows], act)
    return h


def backward(z: Tensor, dh: Tensor, weight: Tensor | None, act: Activation, dtype: torch.dtype) -> Tensor:
    """dz, rounded once from at least fp32; the clamp's derivative at equality is 1.

    Args:
        z: [n, J].
        dh: [n, I], but for the weight.
        weight: [n, 1] in at least fp32, which multiplies dh; or None for ones.
        act: the activation.
        dtype: of dz.
    """
    dz = z.new_empty(z.shape, dtype=dtype)
    for rows in row_blocks(z):
        own = _widen(dh[rows])
        _backward(dz[rows], z[rows], own if weight is None else own * weight[rows], act)
    return dz


def tangent(z: Tensor, dz: Tensor, act: Activation) -> Tensor:
    """[n, I] The tangent of h from z [n, J] and its tangent, in at least fp32: slopes are those of `backward`."""
    ones = dz.new_ones(()).expand(z.shape[0], z.shape[1] // (2 if act.layout else 1))
    slopes = backward(z, ones, None, act, torch.promote_types(z.dtype, torch.float32))
    terms = slopes.mul_(dz)
    if not act.layout:
        return terms
    of_gate, of_up = split(terms, act.layout)
    return of_gate + of_up


def row_blocks(z: Tensor) -> list[slice]:
    """Rows that a CPU's cache holds while they pass through several operators; on a GPU all of them."""
    step = max(1, BLOCK_ELEMENTS // z.shape[1]) if z.device.type == "cpu" else max(1, z.shape[0])
    return [slice(start, start + step) for start in range(0, z.shape[0], step)]


def _forward(z: Tensor, act: Activation) -> Tensor:
    if not act.layout:
        return _plain(z, act.name)
    if _is_plain(act):  # torch evaluates in fp32 within each of the two: act(g) and h are rounded once each
        gate, up = split(z, act.layout)
        return _plain(gate, act.name).mul_(up)
    gate, up = _clamp(*split_wide(z, act.layout), act)
    value = torch.sigmoid(act.alpha * gate).mul_(_softcap(gate, act.gate_softcap))
    value = value.clamp_(max=act.limit) if act.clamp == "after" else value
    return value.mul_(_softcap(up, act.up_softcap) + act.up_offset)


def _backward(dz: Tensor, z: Tensor, dh: Tensor, act: Activation) -> None:
    if not act.layout:
        torch.mul(dh, _value_and_slope(_widen(z), act)[1], out=dz)
        return
    gate, up = split_wide(z, act.layout)
    clamped_gate, clamped_up = _clamp(gate, up, act)
    value, slope = _value_and_slope(clamped_gate, act)
    factor = _softcap(clamped_up, act.up_softcap) + act.up_offset
    beyond = None if act.limit is None else (value if act.clamp == "after" else gate) > act.limit
    value = value.clamp_(max=act.limit) if act.clamp == "after" else value
    d_gate, d_up = slope.mul_(factor).mul_(dh), value.mul_(dh)
    if beyond is not None and act.limit is not None:
        d_gate.masked_fill_(beyond, 0.0)
        d_up.masked_fill_(up.abs() > act.limit, 0.0)
    if act.up_softcap is not None:
        d_up.mul_(_softcap_slope(up, act.up_softcap))
    join(dz, act.layout, d_gate, d_up)


def _is_plain(act: Activation) -> bool:
    """Whether the gate is an activation of torch's own, and nothing is clamped, capped or added."""
    return act.alpha == 1.0 and act.limit is None and act.up_offset == 0.0 and not act.has_softcap


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
        if act.gate_softcap is not None:
            capped = _softcap(gate, act.gate_softcap)
            return capped * s, s * (_softcap_slope(gate, act.gate_softcap) + act.alpha * capped * (1 - s))
        value = gate * s
        return value, s * (1 + act.alpha * gate * (1 - s))
    if act.name == "relu2":
        positive = F.relu(gate)
        return positive.square(), 2 * positive
    approximate = "none" if act.name in ("geglu", "gelu") else "tanh"
    slope = torch.ops.aten.gelu_backward(torch.ones_like(gate), gate, approximate=approximate)
    return F.gelu(gate, approximate=approximate), slope


def _clamp(gate: Tensor, up: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """Both halves, where the limit clamps them; the gate only if that comes before its activation."""
    if act.limit is None:
        return gate, up
    up = up.clamp(-act.limit, act.limit)
    return (gate if act.clamp == "after" else gate.clamp(max=act.limit)), up


def _softcap(value: Tensor, cap: float | None) -> Tensor:
    """cap tanh(v / cap), or the value where there is no cap."""
    return value if cap is None else torch.tanh(value / cap).mul_(cap)


def _softcap_slope(value: Tensor, cap: float) -> Tensor:
    return 1 - torch.tanh(value / cap).square_()


def _widen(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
