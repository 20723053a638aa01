"""From logits to experts and their weights: clauses R1 to R6 and R9."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from moe_ref.conformance.adapters import Layer
from moe_ref.types import MoEConfig

FAR = -40.0  # below, log(1 + exp(v)) is exp(v)


def route(arrays: Mapping[str, Array], layer: Layer) -> tuple[Array, Array]:
    """topk_ids [T, K] int64, and topk_weights [T, K] in at least fp32 and x's dtype, whose gradients JAX finds."""
    logits, config = arrays["router_logits"], layer.config
    ids = choose(jax.lax.stop_gradient(logits), arrays.get("selection_bias"), config)
    logits = logits.astype(jnp.promote_types(wide(logits).dtype, layer.dtype))
    return ids, weigh(logits, ids, config, arrays.get("expert_scale"))


def choose(logits: Array, bias: Array | None, config: MoEConfig) -> Array:
    """The K largest keys of each row; of equal keys the lower id wins (R2), and a NaN counts as -inf (R4)."""
    assert config.top_k is not None
    keys = logits
    if bias is not None or config.num_groups > 1:  # otherwise the logit itself, which is exact
        keys = wide(logits) if bias is None else wide(logits).astype(jnp.promote_types(wide(logits).dtype, bias.dtype))
        if config.selection_key == "score" and config.scoring != "topk_softmax":
            keys = score(jnp.where(undefined(logits, config), 0, keys), config)
    impossible = (logits == -jnp.inf) | jnp.isnan(logits) | jnp.isnan(keys)
    if bias is not None:
        impossible |= (bias == -jnp.inf) | jnp.isnan(bias)
        keys = keys + jnp.where(jnp.isnan(bias), 0, bias)  # R3
    keys = jnp.where(impossible, -jnp.inf, keys)
    if config.num_groups > 1:
        keys = within_groups(keys, config)
    return largest(keys, config.top_k)


def within_groups(keys: Array, config: MoEConfig) -> Array:
    """The keys, with -inf outside the groups that are kept."""
    members = keys.reshape(*keys.shape[:-1], config.num_groups, -1)
    best = -jnp.sort(-members, axis=-1)
    group_key = best[..., 0] if config.group_score == "max" else best[..., 0] + best[..., 1]
    group_key = jnp.where(jnp.isnan(group_key), -jnp.inf, group_key)  # inf - inf
    chosen = largest(group_key, config.topk_groups)
    kept = (chosen[..., None] == jnp.arange(config.num_groups)).any(axis=-2)
    return jnp.where(kept[..., None], members, -jnp.inf).reshape(keys.shape)


def largest(keys: Array, count: int) -> Array:
    """The places of the largest keys, in order; -0 equals +0."""
    return jnp.argsort(-keys, axis=-1, stable=True)[..., :count].astype(jnp.int64)


def weigh(logits: Array, ids: Array, config: MoEConfig, expert_scale: Array | None) -> Array:
    """The weights of the chosen experts; NaN in rows that are undefined (R4)."""
    broken = undefined(logits, config)
    scores = chosen_scores(jnp.where(broken, 0, logits), ids, config)
    weights = renormalized(scores, config) if config.renormalize else scores
    weights = jnp.where(broken, jnp.nan, weights * config.routed_scaling_factor)
    if expert_scale is not None:  # R9
        weights = weights * expert_scale.astype(weights.dtype)[ids]
    return weights


def undefined(logits: Array, config: MoEConfig) -> Array:
    """Rows [T, 1] whose weights are undefined, but for a softmax over nothing but -inf, which gives NaN by itself."""
    broken = jnp.isnan(logits).any(axis=-1, keepdims=True)
    return broken if config.scoring == "sigmoid" else broken | (logits == jnp.inf).any(axis=-1, keepdims=True)


def chosen_scores(logits: Array, ids: Array, config: MoEConfig) -> Array:
    """Scores [T, K], before renormalisation."""
    if config.scoring == "softmax":
        return jnp.take_along_axis(score(logits, config), ids, axis=-1)
    return score(jnp.take_along_axis(logits, ids, axis=-1), config)


def score(logits: Array, config: MoEConfig) -> Array:
    """The scoring, over the last axis or element by element."""
    if config.scoring == "sigmoid":
        return jax.nn.sigmoid(logits)
    return sqrtsoftplus(logits) if config.scoring == "sqrtsoftplus" else jax.nn.softmax(logits, axis=-1)


def sqrtsoftplus(logits: Array) -> Array:
    """sqrt(log(1 + exp(v))): exp(v / 2) far below 0. Nothing is infinite on the way, so that derivatives are right."""
    far = logits < FAR
    near = jnp.where(far, 0, logits)
    small = jnp.log1p(jnp.exp(jnp.where(near > 0, -near, near)))
    return jnp.where(far, jnp.exp(jnp.where(far, logits, 0) / 2), jnp.sqrt(jnp.where(near > 0, near, 0) + small))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def renormalized(scores: Array, config: MoEConfig) -> Array:
    """Scores over their divisor (R5). JAX's derivative squares it, which underflows in fp32 for an epsilon of 1e-20."""
    return scores / divisor(scores, config)


def _renormalized(scores: Array, config: MoEConfig) -> tuple[Array, tuple[Array, Array]]:
    weights = renormalized(scores, config)
    return weights, (scores, weights)


def _renormalized_vjp(config: MoEConfig, kept: tuple[Array, Array], d_weights: Array) -> tuple[Array]:
    scores, weights = kept
    shared = (d_weights * weights).sum(axis=-1, keepdims=True)
    if config.renormalize_form == "max":  # the divisor is a constant below the epsilon
        shared = jnp.where(scores.sum(axis=-1, keepdims=True) < config.renormalize_eps, 0, shared)
    return ((d_weights - shared) / divisor(scores, config),)


renormalized.defvjp(_renormalized, _renormalized_vjp)


def divisor(scores: Array, config: MoEConfig) -> Array:
    """What renormalisation divides by (R5)."""
    total, eps = scores.sum(axis=-1, keepdims=True), config.renormalize_eps
    total = total + eps if config.renormalize_form == "add" else jnp.where(total < eps, eps, total)
    return jnp.where(total == 0, 1, total)


def wide(value: Array) -> Array:
    """The same numbers in at least fp32 (R1, R6)."""
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))
