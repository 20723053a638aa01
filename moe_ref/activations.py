"""Activations and their gradients (clause E1): gated or not, by the names of `moe_ref.MoEConfig`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from moe_ref._typing import Array, Float
from moe_ref.numerics import EXACT, Rounding
from moe_ref.scores import sigmoid
from moe_ref.types import Clamp, MoEConfig


def activation(
    z: Float[Array, "*#samples n J"], config: MoEConfig, rounding: Rounding = EXACT
) -> Float[Array, "*#samples n I"]:
    """The activation: h = act(g) u if gated, with gate and up by ``gate_up_layout``; else h = act(z).

    "swiglu" is h = (clamp(u, -L, L) + up_offset) * g' * sigmoid(alpha g') with g' = min(g, L); or with the clamp after
    the activation h = (clamp(u, -L, L) + up_offset) * min(g sigmoid(alpha g), L); or with caps, cap(v) = c tanh(v / c),
    h = (cap(u) + up_offset) * cap(g) sigmoid(alpha g).

    Source: SwiGLU and GEGLU from Shazeer 2020 (arXiv:2002.05202); the clamped form from gpt-oss's model code, clamped
    after the activation from Step-3.7-Flash's, capped from Inkling 2's; GELU from Hendrycks and Gimpel 2016
    (arXiv:1606.08415); squared ReLU from So et al. 2021 (arXiv:2109.08668).
    """
    xp = array_namespace(z)
    if not config.gated:
        curve = act(z, config)
        return rounding.store("h", rounding.accumulate("act", curve.value, lambda: curve.value_sd))
    gate, up = split_gate_up(z, config)
    curve, factor = act(below(gate, config, "before"), config), factor_of(up, config)
    value = below(rounding.accumulate("act", curve.value, lambda: curve.value_sd), config, "after")
    value = rounding.store("act", value)
    h = factor.value * value
    return rounding.store("h", rounding.accumulate("h", h, lambda: xp.abs(h) + factor.value_sd * xp.abs(value)))


def activation_vjp(
    z: Float[Array, "*#samples n J"],
    config: MoEConfig,
    dh: Float[Array, "*#samples n I"],
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples n J"]:
    """The gradient dz of the activation; the clamp's derivative at equality is 1 (E1)."""
    xp = array_namespace(z, dh)
    if not config.gated:
        curve = act(z, config)
        dz = dh * curve.slope
        return rounding.store("dz", rounding.accumulate("dz", dz, lambda: xp.abs(dh) * curve.slope_sd))
    gate, up = split_gate_up(z, config)
    limit = math.inf if config.limit is None else config.limit
    curve, factor = act(below(gate, config, "before"), config), factor_of(up, config)
    inside = (gate if config.clamp == "before" else curve.value) <= limit
    value = rounding.store("act", below(curve.value, config, "after"))
    zero = xp.zeros_like(dh * gate)
    d_gate = xp.where(inside, dh * factor.value * curve.slope, zero)
    d_up = xp.where(xp.abs(up) <= limit, dh * value * factor.slope, zero)
    dz = join_gate_up(d_gate, d_up, config)

    def sd() -> Array:
        size = xp.abs(factor.value) * curve.slope_sd + factor.value_sd * xp.abs(curve.slope)
        d_gate_sd = xp.where(inside, xp.abs(dh) * size, zero)
        value_sd = xp.where(inside, curve.value_sd, xp.abs(value))
        size = value_sd * xp.abs(factor.slope) + xp.abs(value) * factor.slope_sd
        return join_gate_up(d_gate_sd, xp.where(xp.abs(up) <= limit, xp.abs(dh) * size, zero), config)

    return rounding.store("dz", rounding.accumulate("dz", dz, sd))


class Curve(NamedTuple):
    """An activation and its derivative at each element, and the error of each for unit roundoff 1.

    A difference of nearly equal terms has the error of its terms: 1 + erf(g) for very negative g, 1 - sigmoid(g) for
    large g, 1 - tanh(g)**2 for both.
    """

    value: Array
    slope: Array
    value_sd: Array
    slope_sd: Array


def act(gate: Float[Array, "*#samples n I"], config: MoEConfig) -> Curve:
    """The activation of each element, without the up half."""
    xp = array_namespace(gate)
    size = xp.abs(gate)
    if config.activation in ("swiglu", "silu"):
        s = sigmoid(config.alpha * gate)
        if config.gate_softcap is not None:
            capped = softcap(gate, config.gate_softcap)
            value = capped.value * s
            rest, rest_sd = config.alpha * (1 - s), abs(config.alpha)
            slope = s * (capped.slope + capped.value * rest)
            return Curve(value, slope, xp.abs(value), s * (capped.slope_sd + xp.abs(capped.value) * rest_sd))
        value = gate * s
        slope = s * (1 + config.alpha * gate * (1 - s))
        return Curve(value, slope, xp.abs(value), s * (1 + abs(config.alpha) * size))
    if config.activation == "relu2":
        positive = xp.clip(gate, min=0.0)
        return Curve(positive * positive, 2 * positive, positive * positive, 2 * positive)
    if config.activation in ("geglu", "gelu"):
        inner, d_inner = gate / math.sqrt(2), math.sqrt(2 / math.pi)
        step = erf(inner)
        d_step = xp.exp(-(inner**2)) * d_inner  # the derivative of erf(g / sqrt(2))
        d_step_sd = d_step * (1 + inner**2)
    else:
        c, cubic = math.sqrt(2 / math.pi), 0.044715
        step = xp.tanh(c * gate * (1 + cubic * gate**2))
        d_step = (1 - step**2) * c * (1 + 3 * cubic * gate**2)
        d_step_sd = (1 + step**2) * c * (1 + 3 * cubic * gate**2)
    half, half_sd = 0.5 * (1 + step), 0.5 * (1 + xp.abs(step))
    return Curve(gate * half, half + 0.5 * gate * d_step, size * half_sd, half_sd + 0.5 * size * d_step_sd)


def softcap(value: Float[Array, "*#samples n I"], cap: float) -> Curve:
    """cap * tanh(value / cap): the value where it is small, +-cap where it is large."""
    xp = array_namespace(value)
    tanh = xp.tanh(value / cap)
    return Curve(cap * tanh, 1 - tanh**2, xp.abs(cap * tanh), 1 + tanh**2)


def factor_of(up: Float[Array, "*#samples n I"], config: MoEConfig) -> Curve:
    """What multiplies the activation: the up half, clamped or capped, plus its offset.

    An offset may nearly cancel what a cap computes, whose error is that of the cap. A clamp has none, and its slope is
    1 here: whoever differentiates masks what lies beyond the limit.
    """
    xp = array_namespace(up)
    if config.up_softcap is not None:
        capped = softcap(up, config.up_softcap)
        return capped._replace(value=capped.value + config.up_offset)
    if config.limit is not None:
        up = xp.clip(up, min=-config.limit, max=config.limit)
    return Curve(up + config.up_offset, xp.ones_like(up), xp.zeros_like(up), xp.zeros_like(up))


def below(value: Float[Array, "*#samples n I"], config: MoEConfig, place: Clamp) -> Float[Array, "*#samples n I"]:
    """min(value, L) where that is the clamp's place, "before" or "after" the activation; else the value."""
    if config.limit is None or config.clamp != place:
        return value
    return array_namespace(value).clip(value, max=config.limit)


def erf(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The error function, element by element; NumPy and the array API have none."""
    if is_jax_array(value):
        from moe_ref.jax import erf as erf_of_jax

        return erf_of_jax(value)
    xp = array_namespace(value)
    if hasattr(xp, "erf"):
        return xp.erf(value)
    return np.vectorize(math.erf, otypes=[np.float64])(value)


def split_gate_up(
    z: Float[Array, "*#samples n 2*I"], config: MoEConfig
) -> tuple[Float[Array, "*#samples n I"], Float[Array, "*#samples n I"]]:
    """(gate, up), by ``gate_up_layout``."""
    if config.gate_up_layout == "interleaved":
        return z[..., 0::2], z[..., 1::2]
    half = z.shape[-1] // 2
    return z[..., :half], z[..., half:]


def join_gate_up(
    gate: Float[Array, "*#samples n I"], up: Float[Array, "*#samples n I"], config: MoEConfig
) -> Float[Array, "*#samples n 2*I"]:
    """The inverse of `split_gate_up`."""
    xp = array_namespace(gate, up)
    if config.gate_up_layout == "interleaved":
        return xp.reshape(xp.stack([gate, up], axis=-1), (*gate.shape[:-1], 2 * gate.shape[-1]))
    return xp.concat([gate, up], axis=-1)
