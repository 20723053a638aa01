"""JAX: on a CPU, ragged_dot lets NaN or infinity of one expert reach every row (R4).

Also that of an expert without rows. Exit 0: reproduced, 1: gone.
"""

import sys

import jax
import numpy as np

x = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
stack = np.ones((3, 2, 2), np.float32)
stack[1] = np.nan  # expert 1 has no rows
sizes = np.array([2, 0, 4], np.int32)
right = np.concatenate([x[:2].astype(np.float64) @ stack[0], x[2:].astype(np.float64) @ stack[2]])
found = {
    name: np.asarray(f(x, stack, sizes))
    for name, f in (("eager", jax.lax.ragged_dot), ("jit", jax.jit(jax.lax.ragged_dot)))
}
dx = np.asarray(jax.grad(lambda x: jax.lax.ragged_dot(x, stack, sizes).sum())(x))
stack[1], stack[0, 0, 0] = 1.0, np.inf  # now expert 0, which has rows 0 and 1
inf = np.asarray(jax.lax.ragged_dot(x, stack, sizes))
print(f"jax {jax.__version__} on {jax.default_backend()}: group sizes {sizes.tolist()}, NaN in expert 1")
print(f"observed rows with NaN: { {name: np.isnan(y).any(1).tolist() for name, y in found.items()} }")
print(f"observed rows of dx with NaN: {np.isnan(dx).any(1).tolist()}")
print(f"observed rows that are not finite, for inf in expert 0: {(~np.isfinite(inf)).any(1).tolist()}")
print(f"right: no NaN, {np.isnan(right).any(1).tolist()}; for inf in expert 0, rows 0 and 1 alone")
sys.exit(0 if all(np.isnan(y).all() for y in found.values()) else 1)
