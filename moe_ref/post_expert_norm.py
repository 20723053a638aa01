"""The norm of each expert's output (clause E8), and its gradient (D1)."""

from __future__ import annotations

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float
from moe_ref.numerics import EXACT, Rounding, sum_sd
from moe_ref.types import MoEWeights


def normalize(
    outputs: Float[Array, "*#samples S H"], weights: MoEWeights, rounding: Rounding = EXACT
) -> Float[Array, "*#samples S H"]:
    """o' = n / sqrt(mean(n**2) + eps) with n = gamma o, row by row; the outputs themselves in a layer without norm.

    The factor comes before the mean is taken: most norms multiply by theirs after it. Source: Zhang and Sennrich 2019
    (arXiv:1910.07467); the order from Muse Spark's model code.
    """
    if weights.post_expert_norm is None:
        return outputs
    xp = array_namespace(outputs)
    scaled = outputs * factor_of(weights)
    normed = scaled * inverse_size(scaled, weights, rounding)
    return rounding.store("normed_o", rounding.accumulate("normed_o", normed, lambda: xp.abs(normed)))


def normalize_vjp(
    outputs: Float[Array, "*#samples S H"],
    weights: MoEWeights,
    d_normed: Float[Array, "*#samples S H"],
    rounding: Rounding = EXACT,
) -> tuple[Float[Array, "*#samples S H"], Float[Array, "*#samples H"]]:
    """The gradients of the outputs, and of gamma: a sum over all slots.

    With r = 1 / sqrt(mean(n**2) + eps): dn = r (do' - o' mean(o' do')), do = gamma dn, dgamma = sum(o dn).
    """
    xp = array_namespace(outputs, d_normed)
    scaled = outputs * factor_of(weights)
    r = inverse_size(scaled, weights, rounding)
    normed = scaled * r
    shared = normed * mean(normed * d_normed, "d_normed_mean", rounding)
    dn = r * (d_normed - shared)
    dn = rounding.accumulate("dn", dn, lambda: r * (xp.abs(d_normed) + xp.abs(shared)))
    terms = outputs * dn
    total, length = xp.sum(terms, axis=-2), terms.shape[-2]
    squares = xp.sum(terms * terms, axis=-2)
    d_factor = rounding.accumulate("d_post_expert_norm", total, lambda: sum_sd(total, squares, length))
    return rounding.store("d_o", factor_of(weights) * dn), d_factor


def factor_of(weights: MoEWeights) -> Float[Array, " H"]:
    """Gamma, in float64."""
    gamma = weights.post_expert_norm
    xp = array_namespace(gamma)
    return xp.astype(gamma, xp.float64)


def inverse_size(
    scaled: Float[Array, "*#samples S H"], weights: MoEWeights, rounding: Rounding = EXACT
) -> Float[Array, "*#samples S 1"]:
    """r = 1 / sqrt(mean(n**2) + eps) of each row n."""
    xp = array_namespace(scaled)
    return 1 / xp.sqrt(mean(scaled * scaled, "mean_square", rounding) + weights.config.post_expert_norm_eps)


def mean(terms: Float[Array, "*#samples S H"], site: str, rounding: Rounding = EXACT) -> Float[Array, "*#samples S 1"]:
    """The mean of each row, with the error of its sum."""
    xp = array_namespace(terms)
    length = terms.shape[-1]
    total = xp.sum(terms, axis=-1, keepdims=True)
    squares = xp.sum(terms * terms, axis=-1, keepdims=True)
    return rounding.accumulate(site, total / length, lambda: sum_sd(total, squares, length) / length)
