"""The activations of clause E1. JAX differentiates them; at a limit the derivative is 1, since ``where`` keeps v."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from moe_ref.types import MoEConfig


def activation(z: Array, config: MoEConfig) -> Array:
    """h [S, I] from z [S, J]."""
    if not config.gated:
        return act(z, config)
    gate, up = halves(z, config)
    limit = config.limit
    if limit is not None and config.clamp == "before":
        gate = at_most(gate, limit)
    value = act(gate, config)
    if limit is not None and config.clamp == "after":
        value = at_most(value, limit)
    if limit is not None:
        up = -at_most(-at_most(up, limit), limit)
    return (capped(up, config.up_softcap) + config.up_offset) * value


def halves(z: Array, config: MoEConfig) -> tuple[Array, Array]:
    """Gate and up [S, I]."""
    if config.gate_up_layout == "interleaved":
        return z[:, 0::2], z[:, 1::2]
    return z[:, : z.shape[1] // 2], z[:, z.shape[1] // 2 :]


def act(v: Array, config: MoEConfig) -> Array:
    """Element by element, as in the table."""
    if config.activation in ("swiglu", "silu"):
        return capped(v, config.gate_softcap) * jax.nn.sigmoid(config.alpha * v)
    if config.activation == "relu2":
        positive = jnp.where(v < 0, 0, v)
        return positive * positive
    if config.activation in ("geglu", "gelu"):
        return v * (1 + jax.scipy.special.erf(v / math.sqrt(2))) / 2
    return v * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2


def at_most(v: Array, limit: float) -> Array:
    """min(v, limit), which keeps a NaN."""
    return jnp.where(v > limit, limit, v)


def capped(v: Array, cap: float | None) -> Array:
    """cap * tanh(v / cap), or v."""
    return v if cap is None else cap * jnp.tanh(v / cap)
