"""The products of one layer, each by itself: what ``tune`` times and checks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executors._base.operator import NAMES, Arguments, arguments_of
from executors._bench.layers import BenchLayer, Form
from executors._bench.routing import Batch
from executors._triton import layer as _layer
from executors._triton import operator
from executors._triton import tuned as _tuned
from executors._triton.configs import FAMILIES, KernelConfig
from executors._triton.device import device_guard, device_of
from executors._triton.launch import gradients as _gradients
from executors._triton.launch import products as _products
from executors._triton.launch.grouping import Groups, group
from executors._triton.launch.narrow import Narrow, by_columns, by_rows
from executors._triton.launch.operands import Adapter, LaunchPlan, are_aligned
from executors._triton.tuned_file import Key

LAYER = "layer"  # all products together, and what lies between them


class Backward(NamedTuple):
    """What the products of a backward pass take, as the shipped configuration computes it.

    Attributes:
        dz, dz_columns: [S, J], as rows and as an expert's columns.
        h: [S, I], weighted, as an expert's columns.
        of_down, of_up: gradients of what adapters have between their factors, or None.
    """

    dz: Narrow
    dz_columns: Narrow
    h: Narrow
    of_down: Tensor | None
    of_up: Tensor | None


class Problem:
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

        tensors, static = arguments_of(batch.x, batch.topk_ids, batch.topk_weights, owner.weights())
        given = Arguments(*map(narrowed, tensors), *static)
        self.layer = operator.layer_of(given._replace(topk_weights=batch.topk_weights.detach()))
        self.dy, self.backward, self.form = batch.dy.to(dtype), backward, owner.form
        self.aligned = are_aligned(self.layer.up.matrices, self.layer.down.matrices)
        self.key: Key = _tuned.key_of(self.layer, operator.precision_of(self.layer), self.aligned)
        self.shipped: KernelConfig = operator.shipped_config(self.layer, self.aligned)
        self.device = device_of(self.layer.x.device)
        self.shared = FAMILIES[self.device.family].shared
        self.needs = needs_of(self.layer, owner.form)
        inner = ("inner",) if owner.form.rank else ()
        self.products = ("up", "down", *(("dh", "dx", "outer") if backward else ()), *inner)
        self.groups: Callable[[int], Groups] = cache(self._groups)

    def guard(self) -> AbstractContextManager[object]:
        """Makes the layer's GPU the current one."""
        return device_guard(self.layer.x)

    def plan(self, regime: KernelConfig) -> LaunchPlan:
        """How products run with these tiles."""
        return operator.plan_of(self.layer, self.groups(regime.up.block_m), regime, self.aligned)

    def run(self, product: str, regime: KernelConfig) -> list[Tensor]:
        """The results of a product, or of the whole `LAYER`."""
        return getattr(self, f"_run_{product}")(self.plan(regime))

    def _groups(self, block_m: int) -> Groups:
        return group(self.layer.topk_ids, self.layer.num_experts, block_m)

    def _run_up(self, plan: LaunchPlan) -> list[Tensor]:
        own, up, adapter, tile = self.layer, self.layer.up, self._adapters[0], plan.config.up
        found = _products.up(own.x, up.matrices, up.bias, adapter, own.before, own.act, tile, plan, self.backward)
        return list(found)

    def _run_down(self, plan: LaunchPlan) -> list[Tensor]:
        own, down, adapter, tile = self.layer, self.layer.down, self._adapters[1], plan.config.down
        return [_products.down(self._activations, down.matrices, down.bias, adapter, own.after, tile, plan)]

    def _run_dh(self, plan: LaunchPlan) -> list[Tensor]:
        return [self._dh(self._known.of_down, plan)]

    def _run_dx(self, plan: LaunchPlan) -> list[Tensor]:
        up, known = self.layer.up, self._known
        matrices, adapter = up.matrices.transpose(1, 2), _layer._back(known.of_up, up, self.layer, plan)
        return [_products.down(known.dz, matrices, None, adapter, None, plan.config.dx, plan)]

    def _run_outer(self, plan: LaunchPlan) -> list[Tensor]:
        own, up, down, known = self.layer, self.layer.up, self.layer.down, self._known
        x, dy = Narrow(own.x), Narrow(self.dy)
        if not self.form.rank:
            assert isinstance(down.matrices, Tensor)
            assert isinstance(up.matrices, Tensor)
            return [
                _gradients.outer(dy, known.h, down.matrices, plan, tokens_a=True),
                _gradients.outer(known.dz_columns, x, up.matrices, plan, tokens_b=True, scaled_b=own.before_outer),
            ]
        assert known.of_down is not None
        assert known.of_up is not None
        assert down.lora_a is not None
        assert up.lora_a is not None
        return [
            _gradients.outer(by_columns(known.of_down, own.dtype, plan), known.h, down.lora_a, plan),
            _gradients.outer(
                by_columns(known.of_up, own.dtype, plan, own.before_narrowing),
                x,
                up.lora_a,
                plan,
                tokens_b=True,
                scaled_b=own.before_outer,
            ),
        ]

    def _run_inner(self, plan: LaunchPlan) -> list[Tensor]:
        own, up, down = self.layer, self.layer.up, self.layer.down
        assert up.lora_a is not None
        assert down.lora_a is not None
        found = [
            _products.inner(Narrow(own.x), up.lora_a, up.scaling, plan, of_tokens=True),
            _products.inner(self._activations, down.lora_a, down.scaling, plan, of_tokens=False),
        ]
        if self.backward:
            found.append(_layer._d_inner(Narrow(self.dy), down, plan, of_tokens=True))
            found.append(_layer._d_inner(self._known.dz, up, plan, of_tokens=False))
        return found

    def _run_layer(self, plan: LaunchPlan) -> list[Tensor]:
        y, z = _layer.forward(self.layer, plan, keep_z=self.backward)
        if not self.backward:
            return [y]
        found = _layer.backward(self.layer, plan, z, self.dy, self.needs)
        return [y, *(found[name] for name in sorted(found))]

    @cached_property
    def _adapters(self) -> tuple[Adapter | None, Adapter | None]:
        plan = self.plan(self.shipped)
        up = _layer._adapter(Narrow(self.layer.x), self.layer.up, plan, of_tokens=True)
        return up, _layer._adapter(self._activations, self.layer.down, plan, of_tokens=False)

    @cached_property
    def _activations(self) -> Narrow:
        plan = self.plan(self.shipped)
        return by_rows(_layer.activations(self.layer, plan, keep_z=False)[0], self.layer.dtype, plan)

    @cached_property
    def _known(self) -> Backward:
        own, up, down, plan = self.layer, self.layer.up, self.layer.down, self.plan(self.shipped)
        _, z = _layer.activations(own, plan, keep_z=True)
        of_down = None if down.lora_b is None else _layer._d_inner(Narrow(self.dy), down, plan, of_tokens=True)
        dz, h, _ = _gradients.dz(
            self._dh(of_down, plan),
            z,
            own.topk_weights,
            not own.scale_input,
            self.dy,
            down.bias,
            own.act,
            plan,
            want_dz=True,
            want_h=True,
            want_weights=False,
        )
        rows, of_h = by_rows(dz, own.dtype, plan), by_columns(h, own.dtype, plan)
        of_dz = by_columns(dz, own.dtype, plan, own.before_narrowing)
        of_up = None if up.lora_b is None else _layer._d_inner(rows, up, plan, of_tokens=False)
        return Backward(rows, of_dz, of_h, of_down, of_up)

    def _dh(self, of_down: Tensor | None, plan: LaunchPlan) -> Tensor:
        down = self.layer.down
        matrices, adapter = down.matrices.transpose(1, 2), _layer._back(of_down, down, self.layer, plan)
        return _products.up(self.dy, matrices, None, adapter, None, _layer.NONE, plan.config.dh, plan, keep_z=False)[0]


def needs_of(layer: _layer.Layer, form: Form) -> dict[str, bool]:
    """Which gradients a training step wants: beside adapters, none of other weights."""
    there = {
        f"{prefix}_{name}": getattr(projection, field) is not None
        for prefix, projection in (("gate_up", layer.up), ("down", layer.down))
        for name, field in (("proj", "matrices"), ("proj_bias", "bias"), ("lora_a", "lora_a"), ("lora_b", "lora_b"))
    }
    return {
        name: name in ("x", "topk_weights") or (there[name] and ("lora" in name or not form.rank)) for name in NAMES
    }
