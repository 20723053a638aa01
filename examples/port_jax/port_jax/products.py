"""Each row times its expert's matrix, by ``jax.lax.ragged_dot``.

On a CPU, ragged_dot (JAX 0.10.2) multiplies every row by every matrix, with zeros where the two do not belong together.
Zero times NaN is NaN: one broken matrix, even of an expert without rows, breaks every row. So matrices go in without
what is not finite, and rows of such an expert get the NaN afterwards.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped(rows: Array, stack: Array, sizes: Array, experts: Array, out_dtype: jnp.dtype) -> Array:
    """out [S, m] from rows [S, k] in expert order and stack [E, m, k]: 0 for rows of no expert.

    Args:
        rows: of the stack's dtype.
        stack: a matrix for each expert.
        sizes: [E] int32, rows of each expert.
        experts: [S] the expert of each row, E for none.
        out_dtype: of the result, in which products are summed.
    """
    finite = jnp.isfinite(stack)
    out = _product(rows, jnp.where(finite, stack, 0), sizes, out_dtype)
    whole = finite.all(axis=2).at[experts].get(mode="fill", fill_value=True)
    return jnp.where(whole, out, jnp.nan)


def _product(rows: Array, stack: Array, sizes: Array, out_dtype: jnp.dtype) -> Array:
    return jax.lax.ragged_dot(rows, stack.swapaxes(1, 2), sizes, preferred_element_type=out_dtype)


def _forward(
    rows: Array, stack: Array, sizes: Array, experts: Array, out_dtype: jnp.dtype
) -> tuple[Array, tuple[Array, ...]]:
    return grouped(rows, stack, sizes, experts, out_dtype), (rows, stack, sizes, experts)


def _backward(out_dtype: jnp.dtype, kept: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, stack, sizes, experts = kept
    d_rows = grouped(d_out, stack.swapaxes(1, 2).astype(d_out.dtype), sizes, experts, d_out.dtype)
    _, vjp = jax.vjp(lambda stack: _product(rows, stack, sizes, out_dtype), jnp.zeros_like(stack))
    return d_rows.astype(rows.dtype), vjp(d_out)[0], None, None


grouped.defvjp(_forward, _backward)
