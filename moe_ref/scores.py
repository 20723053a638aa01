"""Scores of logits, and their derivatives (clauses R3, R5)."""

from __future__ import annotations

import math

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Float, Int
from moe_ref.numerics import EXACT, Rounding


def softmax(logits: Float[Array, "*#samples T N"], rounding: Rounding = EXACT) -> Float[Array, "*#samples T N"]:
    """exp(l - max l) / sum exp(l - max l), over the last axis."""
    xp = array_namespace(logits)
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    shifted = rounding.accumulate(
        "shifted_logits", shifted, lambda: xp.where(xp.isfinite(shifted), xp.abs(shifted), xp.zeros_like(shifted))
    )
    exponentials = xp.exp(shifted)
    total = xp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / rounding.accumulate("softmax_sum", total, lambda: total)


def sigmoid(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / (1 + exp(-v)), without overflow on either side."""
    xp = array_namespace(value)
    positive = value >= 0
    small = xp.exp(xp.where(positive, -value, value))  # not -|v|: autograd's derivative of |v| at 0 is 0
    return xp.where(positive, xp.ones_like(small), small) / (1 + small)


FAR = -40.0  # log(1 + exp(v)) is exp(v) below, and v above 40, to the last bit of float64


def sqrtsoftplus(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sqrt(log(1 + exp(v))), without overflow and with all digits on either side: exp(v / 2) far below 0.

    Nothing is infinite on the way, so that autograd's derivative is right too: 0 at -inf.
    """
    xp = array_namespace(value)
    far, zero = value < FAR, xp.zeros_like(value)
    near = xp.where(far, zero, value)
    small = xp.log1p(xp.exp(xp.where(near > 0, -near, near)))
    return xp.where(far, xp.exp(xp.where(far, value, zero) / 2), xp.sqrt(xp.where(near > 0, near, zero) + small))


def sqrtsoftplus_slope(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The derivative of `sqrtsoftplus`, sigmoid(v) / (2 sqrtsoftplus(v)): exp(v / 2) / 2 far below 0."""
    xp = array_namespace(value)
    score = sqrtsoftplus(value)
    near = xp.where(value < FAR, xp.zeros_like(value), value)
    return xp.where(value < FAR, score / 2, sigmoid(near) / (2 * sqrtsoftplus(near)))


def exponent_error(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The relative deviation of what is computed from exp(v / 2), for unit roundoff 1.

    An implementation may compute exp(v) as a power of 2 whose exponent, v log2(e), is rounded first.
    """
    xp = array_namespace(value)
    return 1 + xp.where((value < 0) & (value > -math.inf), -value, xp.zeros_like(value)) / 2


def softmax_vjp(
    p: Float[Array, "*#samples T N"], dp: Float[Array, "*#samples T N"], rounding: Rounding = EXACT
) -> Float[Array, "*#samples T N"]:
    """Gradient d logits = p (dp - <p, dp>). The terms nearly cancel; the error is that of the terms."""
    xp = array_namespace(p, dp)
    terms = p * dp
    d_logits = terms - p * xp.sum(terms, axis=-1, keepdims=True)
    return rounding.accumulate(
        "d_router_logits",
        d_logits,
        lambda: xp.abs(terms) + p * xp.sum(xp.abs(terms), axis=-1, keepdims=True),
    )


def take_chosen(values: Float[Array, "*#samples T E"], topk_ids: Int[Array, "T K"]) -> Float[Array, "*#samples T K"]:
    """values[..., t, topk_ids[t, k]]."""
    xp = array_namespace(values)
    experts = xp.arange(values.shape[-1], device=device(values))
    zero = xp.zeros_like(values)
    columns = [
        xp.sum(xp.where(experts == topk_ids[..., k, None], values, zero), axis=-1) for k in range(topk_ids.shape[-1])
    ]
    return xp.stack(columns, axis=-1)


def put_chosen(
    values: Float[Array, "*#samples T K"], topk_ids: Int[Array, "T K"], num_experts: int
) -> Float[Array, "*#samples T E"]:
    """The transpose of `take_chosen`: zero except at [t, topk_ids[t, k]]."""
    xp = array_namespace(values)
    experts = xp.arange(num_experts, device=device(values))
    total = xp.zeros((*values.shape[:-1], num_experts), dtype=values.dtype, device=device(values))
    for k in range(topk_ids.shape[-1]):
        column = values[..., k, None]
        total = total + xp.where(experts == topk_ids[..., k, None], column, xp.zeros_like(column))
    return total
