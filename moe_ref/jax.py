"""The specification on JAX's arrays: ``import moe_ref.jax`` makes pytrees of its dataclasses.

Then `moe_ref.moe` and the rest take arrays of ``jax.numpy``, alone and under ``jax.jit``, ``jax.vjp`` and ``jax.vmap``.
float64 must be on, by ``jax.config.update("jax_enable_x64", True)`` or ``with jax.enable_x64(True)``; without it every
call is refused. A configuration is static, everything else of a layer is a leaf::

    layer = jax.jit(moe_ref.moe)(x, router_logits, weights)  # the config of the weights is part of their tree
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)  # layers of one configuration
    each = jax.vmap(moe_ref.moe)(xs, logits, stacked)

Under ``jit`` and ``vmap`` the size of a group is not known, so every expert computes all rows (`moe_ref.blocks`).
"""

from __future__ import annotations

from dataclasses import fields

import jax
import jax.scipy.special

from moe_ref._typing import Array, Float
from moe_ref.types import (
    ExpertLoRA,
    Grouping,
    MoEConfig,
    MoEGradients,
    MoEWeights,
    MXFP4Tensor,
    NF4Tensor,
    Routing,
)

# Of each dataclass, the fields that are no arrays: they are static, and compared by value.
STATIC: dict[type, tuple[str, ...]] = {
    ExpertLoRA: ("gate_up_scaling", "down_scaling"),
    MoEWeights: ("config",),
    NF4Tensor: ("shape", "dtype", "quant_type", "blocksize", "nested_blocksize", "transposed"),
    MXFP4Tensor: ("dtype", "transposed"),
    Routing: (),
    Grouping: (),
    MoEGradients: (),
}


def erf(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The error function, element by element."""
    return jax.scipy.special.erf(value)


def _register() -> None:
    jax.tree_util.register_static(MoEConfig)
    for kind, static in STATIC.items():
        leaves = [field.name for field in fields(kind) if field.name not in static]
        jax.tree_util.register_dataclass(kind, leaves, static)


_register()
