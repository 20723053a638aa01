"""The products of one layer, each by itself: what ``tune`` times and checks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executors._base.arguments import arguments_of
from executors._base.operator import NAMES
from executors._bench.layers import BenchLayer, Storage
from executors._bench.routing import Batch
from executors._triton import layer, operator
from executors._triton import tuned as _tuned
from executors._triton.configs import FAMILIES, KernelConfig
from executors._triton.device import device_guard, device_of
from executors._triton.launch import products
from executors._triton.launch.grouping import Groups, group
from executors._triton.launch.narrow import Narrow, by_rows
from executors._triton.launch.operands import Adapter, LaunchPlan, are_aligned
from executors._triton.tuned_file import Key

LAYER = "layer"  # all products together, and what lies between them


class Backward(NamedTuple):
    """What the products of a backward pass take, as the shipped configuration computes it.

    Attributes:
        dz: [S, J].
        h: [S, I], weighted.
        of_down, of_up: gradients of what adapters have between their factors, or None.
    """

    dz: Tensor
    h: Tensor
    of_down: Tensor | None
    of_up: Tensor | None


class Workload:
    """A layer with an input.

    Args:
        owner: the layer, with adapters or without; beside adapters its other weights are frozen.
        batch: the input.
        dtype: of x and the weights.
        backward: whether the products of the backward pass are tuned too.

    Attributes:
        layer: as the kernels take it.
        key: what its choice is stored under.
        shipped: the tiles that ship with this package.
        products: what is tuned, in order.
        shared: bytes of shared memory that a program may have.
    """

    def __init__(self, owner: BenchLayer, batch: Batch, dtype: torch.dtype, backward: bool) -> None:
        def narrowed(value: Any) -> Any:
            return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        given = arguments_of(batch.x, batch.topk_ids, batch.topk_weights, owner.weights())
        given = given.with_tensors([narrowed(tensor) for tensor in given.tensors()])
        self.layer = operator.layer_of(given._replace(topk_weights=batch.topk_weights.detach()))
        self.dy, self.backward, self.storage = batch.dy.to(dtype), backward, owner.storage
        self.aligned = are_aligned(self.layer.up.matrices, self.layer.down.matrices)
        self.key: Key = _tuned.key_of(self.layer, operator.precision_of(self.layer), self.aligned)
        self.shipped: KernelConfig = operator.shipped_config(self.layer, self.aligned)
        self.device = device_of(self.layer.x.device)
        self.shared = FAMILIES[self.device.family].shared
        self.needs = needs_of(self.layer, owner.storage)
        inner = ("inner",) if owner.storage.rank else ()
        self.products = ("up", "down", *(("dh", "dx", "outer") if backward else ()), *inner)
        self.groups: Callable[[int], Groups] = cache(self._groups)

    def guard(self) -> AbstractContextManager[object]:
        """Makes the layer's GPU the current one."""
        return device_guard(self.layer.x)

    def plan(self, config: KernelConfig) -> LaunchPlan:
        """How products run with these tiles."""
        return operator.plan_of(self.layer, self.groups(config.up.block_m), config, self.aligned)

    def run(self, product: str, config: KernelConfig) -> list[Tensor]:
        """The results of a product, or of the whole `LAYER`."""
        return getattr(self, f"_run_{product}")(self.plan(config))

    def _groups(self, block_m: int) -> Groups:
        return group(self.layer.topk_ids, self.layer.num_experts, block_m)

    def _run_up(self, plan: LaunchPlan) -> list[Tensor]:
        own, up, adapter, tile = self.layer, self.layer.up, self._adapters[0], plan.config.up
        found = products.up(own.x, up.matrices, up.bias, adapter, own.before, own.act, tile, plan, self.backward)
        return list(found)

    def _run_down(self, plan: LaunchPlan) -> list[Tensor]:
        own, down, adapter, tile = self.layer, self.layer.down, self._adapters[1], plan.config.down
        return [products.down(self._activations, down.matrices, down.bias, adapter, own.after, tile, plan)]

    def _run_dh(self, plan: LaunchPlan) -> list[Tensor]:
        return [layer.activation_gradient(self.layer, plan, self.dy, self._known.of_down)]

    def _run_dx(self, plan: LaunchPlan) -> list[Tensor]:
        rows = by_rows(self._known.dz, self.layer.dtype, plan)
        return [layer.input_gradient(self.layer, plan, rows, self._known.of_up)]

    def _run_outer(self, plan: LaunchPlan) -> list[Tensor]:
        own, known = self.layer, self._known
        part = "lora_a" if self.storage.rank else "proj"
        wanted = {name: name in (f"gate_up_{part}", f"down_{part}") for name in NAMES}
        found = layer.down_gradients(own, plan, known.h, self.dy, known.of_down, wanted)
        return list((found | layer.up_gradients(own, plan, known.dz, known.of_up, wanted)).values())

    def _run_inner(self, plan: LaunchPlan) -> list[Tensor]:
        own, up, down = self.layer, self.layer.up, self.layer.down
        assert up.lora_a is not None
        assert down.lora_a is not None
        found = [
            products.inner(Narrow(own.x), up.lora_a, up.scaling, plan, of_tokens=True),
            products.inner(self._activations, down.lora_a, down.scaling, plan, of_tokens=False),
        ]
        if self.backward:
            dz = by_rows(self._known.dz, own.dtype, plan)
            found.append(layer.inner_gradient(Narrow(self.dy), down, plan, of_tokens=True))
            found.append(layer.inner_gradient(dz, up, plan, of_tokens=False))
        return found

    def _run_layer(self, plan: LaunchPlan) -> list[Tensor]:
        y, z = layer.forward(self.layer, plan, keep_z=self.backward)
        if not self.backward:
            return [y]
        found = layer.backward(self.layer, plan, z, self.dy, self.needs)
        return [y, *(found[name] for name in sorted(found))]

    @cached_property
    def _adapters(self) -> tuple[Adapter | None, Adapter | None]:
        plan = self.plan(self.shipped)
        up = layer.adapter_of(Narrow(self.layer.x), self.layer.up, plan, of_tokens=True)
        return up, layer.adapter_of(self._activations, self.layer.down, plan, of_tokens=False)

    @cached_property
    def _activations(self) -> Narrow:
        plan = self.plan(self.shipped)
        return by_rows(layer.activations(self.layer, plan, keep_z=False)[0], self.layer.dtype, plan)

    @cached_property
    def _known(self) -> Backward:
        own, up, down, plan = self.layer, self.layer.up, self.layer.down, self.plan(self.shipped)
        _, z = layer.activations(own, plan, keep_z=True)
        of_down = of_up = None
        if self.storage.rank:
            of_down = layer.inner_gradient(Narrow(self.dy), down, plan, of_tokens=True)
        dh = layer.activation_gradient(own, plan, self.dy, of_down)
        dz, h, _ = layer.preactivation_gradient(own, plan, dh, z, self.dy)
        if self.storage.rank:
            of_up = layer.inner_gradient(by_rows(dz, own.dtype, plan), up, plan, of_tokens=False)
        return Backward(dz, h, of_down, of_up)


def needs_of(own: layer.Layer, storage: Storage) -> dict[str, bool]:
    """Which gradients a training step wants: beside adapters, none of other weights."""
    there = {
        f"{prefix}_{name}": getattr(projection, field) is not None
        for prefix, projection in (("gate_up", own.up), ("down", own.down))
        for name, field in (("proj", "matrices"), ("proj_bias", "bias"), ("lora_a", "lora_a"), ("lora_b", "lora_b"))
    }
    there["post_expert_norm"] = False  # Triton's kernels have none
    return {
        name: name in ("x", "topk_weights") or (there[name] and ("lora" in name or not storage.rank)) for name in NAMES
    }
