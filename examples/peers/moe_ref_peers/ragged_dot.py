"""JAX' ragged_dot, with as little around it as makes a layer: slots in order of experts, SwiGLU, the sum over slots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from torch.utils.dlpack import from_dlpack

from moe_ref.conformance.adapters import Arrays, ForeignExecutor, Layer
from moe_ref_peers._peer import plain_swiglu

if TYPE_CHECKING:
    from torch import Tensor

    from executors import Capabilities


class RaggedDot(ForeignExecutor):
    """``jax_ragged_dot``: kernels of another framework; slots of no expert are rows past the last group."""

    name: ClassVar[str] = "jax_ragged_dot"
    capabilities: ClassVar[Capabilities] = plain_swiglu(
        devices=frozenset({"cpu"}), dtypes=frozenset({"float32", "bfloat16", "float16"})
    )
    survives_fork = False  # its threads do not

    def forward(self, arrays: Arrays, layer: Layer) -> Array:
        """y [T, H]."""
        with jax.enable_x64(True):
            return _layer(dict(arrays))

    def backward(self, arrays: Arrays, layer: Layer, dy: Any, wanted: Sequence[str]) -> dict[str, Array]:
        """The gradients of <dy, y>, by name."""
        with jax.enable_x64(True):
            return _gradients(dict(arrays), dy, tuple(wanted))

    def array(self, tensor: Tensor) -> Array:
        """The tensor's memory, where JAX's rules of alignment allow it; else a copy."""
        with jax.enable_x64(True):
            return jnp.from_dlpack(tensor)

    def tensor(self, array: Array) -> Tensor:
        """A copy: arrays of JAX never change, and tensors may."""
        return from_dlpack(array.block_until_ready()).clone()


@jax.jit
def _layer(arrays: dict[str, Array]) -> Array:
    x, ids, weights = arrays["x"], arrays["topk_ids"], arrays["topk_weights"]
    experts, (tokens, top_k) = len(arrays["down_proj"]), ids.shape
    owner = jnp.where((ids >= 0) & (ids < experts), ids, experts).reshape(-1)
    order = jnp.argsort(owner, stable=True)
    sizes = jnp.bincount(owner, length=experts + 1)[:experts].astype(jnp.int32)
    owned = (owner[order] < experts)[:, None]
    rows = jnp.where(owned, jnp.repeat(x.astype(jnp.float32), top_k, axis=0)[order], 0).astype(x.dtype)

    def product(rows: Array, stack: Array) -> Array:
        return jax.lax.ragged_dot(rows, stack.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)

    gate, up = jnp.split(product(rows, arrays["gate_up_proj"]), 2, axis=1)
    outputs = product((jax.nn.silu(gate) * up).astype(x.dtype), arrays["down_proj"])
    slot_weights = weights.astype(jnp.float32).reshape(-1, 1)[order]
    weighted = jnp.where(owned, outputs * jnp.where(owned, slot_weights, 0), 0)
    by_slot = jnp.zeros_like(weighted).at[order].set(weighted)
    return by_slot.reshape(tokens, top_k, -1).sum(axis=1).astype(x.dtype)


@partial(jax.jit, static_argnums=2)
def _gradients(arrays: dict[str, Array], dy: Array, wanted: tuple[str, ...]) -> dict[str, Array]:
    given = {name: value for name, value in arrays.items() if name not in wanted}
    _, vjp = jax.vjp(lambda own: _layer(given | own), {name: arrays[name] for name in wanted})
    found: dict[str, Array] = vjp(dy)[0]
    return found
