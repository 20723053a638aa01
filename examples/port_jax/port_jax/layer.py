"""The layer: slots sorted by expert, the experts, and the sum over each token's slots (G1, R7, E1 to E8, C1, C3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from moe_ref.conformance.adapters import Layer
from port_jax.activations import activation
from port_jax.products import grouped
from port_jax.routing import route, wide


@dataclass(frozen=True)
class Groups:
    """Slots in expert order; those of no expert come last.

    Attributes:
        experts: [S] the expert of each row; E for a row of none.
        order: [S] the slot of each row.
        sizes: [E] rows of each expert.
    """

    experts: Array
    order: Array
    sizes: Array


def moe(arrays: Mapping[str, Array], layer: Layer) -> Array:
    """y [T, H], in x's dtype."""
    if "router_logits" in arrays:
        ids, weights = route(arrays, layer)
    else:
        ids, weights = arrays["topk_ids"], arrays["topk_weights"]
    x, top_k = arrays["x"], ids.shape[1]
    tall = wide(x)
    groups = group(ids, arrays["gate_up_proj"].shape[0])
    owned = (groups.experts < len(groups.sizes))[:, None]
    slots = jnp.repeat(tall, top_k, axis=0)  # so that the gradients of a token's slots add up in at least fp32 (E2)
    rows = jnp.where(owned, slots[groups.order], 0)  # an empty slot is not read (R7)
    slot_weights = jnp.where(owned, weights.astype(tall.dtype).reshape(-1, 1)[groups.order], 0)
    rows = slot_weights * rows if layer.config.scale_input else rows  # C3
    outputs = normalized(experts(rows, groups, arrays, layer), arrays, layer)
    outputs = outputs if layer.config.scale_input else slot_weights * outputs
    by_slot = jnp.where(owned, outputs, 0)[jnp.argsort(groups.order)]
    return by_slot.reshape(-1, top_k, x.shape[1]).sum(axis=1).astype(x.dtype)


def group(ids: Array, num_experts: int) -> Groups:
    """Sorts slots by expert, stably (G1)."""
    owner = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts).reshape(-1)
    order = jnp.argsort(owner, stable=True)
    sizes = jnp.bincount(owner, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return Groups(owner[order], order, sizes)


def experts(rows: Array, groups: Groups, arrays: Mapping[str, Array], layer: Layer) -> Array:
    """o [S, H] in at least fp32, from rows [S, H]; the products are of x's dtype."""
    dtype = arrays["x"].dtype
    z = linear(rows, "gate_up", groups, arrays, layer.gate_up_scaling, dtype)
    return linear(activation(z, layer.config), "down", groups, arrays, layer.down_scaling, dtype)


def linear(
    rows: Array, name: str, groups: Groups, arrays: Mapping[str, Array], scaling: float, dtype: jnp.dtype
) -> Array:
    """Each row times its expert's matrix, with the adapter (E6) and the bias."""

    def product(rows: Array, stack: Array) -> Array:
        narrow = dtype if stack.dtype == dtype == jnp.bfloat16 else rows.dtype  # fp16 would overflow (E7)
        return grouped(rows.astype(narrow), stack.astype(narrow), groups.sizes, groups.experts, rows.dtype)

    out = product(rows, arrays[f"{name}_proj"])
    if f"{name}_lora_a" in arrays:
        inner = product(rows, arrays[f"{name}_lora_a"])
        out = out + product(scaling * inner, arrays[f"{name}_lora_b"])
    if f"{name}_proj_bias" in arrays:
        bias = arrays[f"{name}_proj_bias"].astype(out.dtype)
        out = out + bias.at[groups.experts].get(mode="fill", fill_value=0)
    return out


def normalized(outputs: Array, arrays: Mapping[str, Array], layer: Layer) -> Array:
    """The norm of each expert's output (E8): the factor comes before the mean."""
    if "post_expert_norm" not in arrays:
        return outputs
    n = arrays["post_expert_norm"].astype(outputs.dtype) * outputs
    return n / jnp.sqrt((n * n).mean(axis=1, keepdims=True) + layer.config.post_expert_norm_eps)
