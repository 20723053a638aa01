"""The executor ``jax``: the layer of moe-ref's specification in JAX, with gradients, on whatever device JAX has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from executors import Capabilities
from moe_ref.conformance.adapters import Arrays, ForeignRouter, Layer
from port_jax.layer import moe
from port_jax.routing import route


class Jax(ForeignRouter):
    """Compiled once for each configuration and each shape; float64 is on while a call runs, and only then."""

    name: ClassVar[str] = "jax"
    capabilities: ClassVar[Capabilities] = Capabilities(devices=frozenset({"cpu", "cuda"}), post_expert_norm=True)
    survives_fork = False  # its threads do not

    def forward(self, arrays: Arrays, layer: Layer) -> Array:
        """y [T, H], in x's dtype."""
        with jax.enable_x64(True):
            return _forward(dict(arrays), layer)

    def backward(self, arrays: Arrays, layer: Layer, dy: Array, wanted: Sequence[str]) -> dict[str, Array]:
        """The gradients of <dy, y>, by name."""
        with jax.enable_x64(True):
            return _backward(dict(arrays), layer, dy, tuple(wanted))

    def choose(self, arrays: Arrays, layer: Layer) -> tuple[Array, Array]:
        """topk_ids [T, K] int64 and topk_weights [T, K]."""
        with jax.enable_x64(True):
            return _choose(dict(arrays), layer)

    def array(self, tensor: Tensor) -> Array:
        """The tensor's memory, where JAX's rules of alignment allow it; else a copy."""
        with jax.enable_x64(True):
            return jnp.from_dlpack(tensor)

    def tensor(self, array: Array) -> Tensor:
        """A copy: arrays of JAX never change, and tensors may."""
        return from_dlpack(array.block_until_ready()).clone()


@partial(jax.jit, static_argnums=1)
def _forward(arrays: dict[str, Array], layer: Layer) -> Array:
    return moe(arrays, layer)


@partial(jax.jit, static_argnums=(1, 3))
def _backward(arrays: dict[str, Array], layer: Layer, dy: Array, wanted: tuple[str, ...]) -> dict[str, Array]:
    given = {name: value for name, value in arrays.items() if name not in wanted}
    _, vjp = jax.vjp(lambda own: moe(given | own, layer), {name: arrays[name] for name in wanted})
    found: dict[str, Array] = vjp(dy)[0]
    return found


@partial(jax.jit, static_argnums=1)
def _choose(arrays: dict[str, Array], layer: Layer) -> tuple[Array, Array]:
    return route(arrays, layer)
