"""The custom operators of torch: arguments taken apart, the device's configuration chosen, the layer launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors._base.arguments import Arguments
from executors._base.operator import Kept, Operator, define, owners_of
from executors._triton import configs, interpreter
from executors._triton import layer as _layer
from executors._triton import tuned as _tuned
from executors._triton.configs import KernelConfig
from executors._triton.decode_rule import DECODED, FUSED, describe, path_of
from executors._triton.device import INTERPRETED, device_guard, device_of
from executors._triton.device import takes_cpu as takes_cpu
from executors._triton.launch import operands
from executors._triton.launch.grouping import Groups, bounds_of, group
from executors._triton.launch.grouping import check_slots as check_slots
from executors._triton.launch.narrow import between
from executors._triton.launch.operands import LaunchPlan
from executors._triton.layer import Layer
from executors._triton.tangent import tangent
from moe_ref.types import PackedTensor


class Kernels(NamedTuple):
    """The kernels as an operator's implementation.

    Attributes:
        name: of the operator.
        batch_invariant: whether one configuration serves any number of rows (C2).
        tuned: whether tiles that were chosen on this machine replace the shipped ones.
        path: of projections in 4 bits, "fused" or "decoded"; "" follows the rule (`executors._triton.decode_rule`).
    """

    name: str
    batch_invariant: bool = False
    tuned: bool = False
    path: str = ""

    @property
    def gradient_format(self) -> torch.memory_format:
        """Gradients have their owners' strides."""
        return torch.preserve_format

    def forward(self, given: Arguments, keep_z: bool, _keep_decoded: bool) -> tuple[Tensor, Kept]:
        """y [T, H]; z is all that a backward pass takes."""
        if not given.topk_ids.numel():
            return self.fake(given, keep_z, False)
        if INTERPRETED:
            interpreter.mend()
        layer = layer_of(given)
        with device_guard(given.x):
            plan = self._plan(layer)
            y, z = _layer.forward(readable(layer, plan), plan, keep_z)
        return y, self._kept(z)

    def fake(self, given: Arguments, keep_z: bool, _keep_decoded: bool) -> tuple[Tensor, Kept]:
        """Tensors of the same shapes."""
        x, slots = given.x, given.topk_ids.numel()
        z = x.new_empty(slots if keep_z else 0, given.matrices()[0].shape[1], dtype=between(x.dtype))
        return torch.empty_like(x, memory_format=torch.contiguous_format), self._kept(z)

    def backward(self, given: Arguments, kept: Kept, dy: Tensor, needs: dict[str, bool]) -> dict[str, Tensor]:
        """The gradients that are needed."""
        if not given.topk_ids.numel():
            return _layer.zeros(owners_of(given), needs)
        if INTERPRETED:
            interpreter.mend()
        layer = layer_of(given)
        with device_guard(given.x):
            plan = self._plan(layer)
            upstream = operands.readable(dy, plan.aligned)
            return _layer.backward(readable(layer, plan), plan, kept.z.contiguous(), upstream, needs)

    def tangent(self, given: Arguments, tangents: dict[str, Tensor]) -> Tensor:
        """The tangent of y."""
        if not given.topk_ids.numel():
            return torch.zeros(given.x.shape, dtype=given.x.dtype, device=given.x.device)
        if INTERPRETED:
            interpreter.mend()
        layer = layer_of(given)
        with device_guard(given.x):
            plan = self._plan(layer)
            return tangent(readable(layer, plan), plan, tangents)

    def _kept(self, z: Tensor) -> Kept:
        """Slots are sorted anew in backward: hooks may hand back weights with other strides, and so other tiles."""
        return Kept(z, *(z.new_empty(0) for _ in Kept._fields[1:]))

    def _plan(self, layer: Layer) -> LaunchPlan:
        packed, family = is_packed(layer), device_of(layer.x.device).family
        decoded = packed and (self.path or path_of(family, rows_of(layer))) == DECODED
        aligned = operands.are_aligned(layer.up.matrices, layer.down.matrices, decoded=decoded)
        config = _tuned.config_for(layer, precision_of(layer), aligned) if self.tuned and not packed else None
        if config is None:
            fused = packed and not decoded
            config = shipped_config(layer, aligned, fused=fused, batch_invariant=self.batch_invariant)
        groups = group(layer.topk_ids, layer.num_experts, config.up.block_m)
        return plan_of(layer, groups, config, aligned, decoded=decoded)


def is_packed(layer: Layer) -> bool:
    """Whether a projection is in 4 bits."""
    return isinstance(layer.up.matrices, PackedTensor) or isinstance(layer.down.matrices, PackedTensor)


def rows_of(layer: Layer) -> float:
    """The mean rows of an expert, S / E."""
    return layer.topk_ids.numel() / layer.num_experts


def shipped_config(layer: Layer, aligned: bool, *, fused: bool = False, batch_invariant: bool = False) -> KernelConfig:
    """The configuration that ships with this package.

    Args:
        layer: the layer.
        aligned: as `executors._triton.launch.operands.are_aligned` has it.
        fused: whether a projection is in 4 bits, and decoded in the products.
        batch_invariant: whether one configuration serves any number of rows.
    """
    return configs.config_of(
        device_of(layer.x.device).family,
        packed=fused,
        narrow=layer.x.element_size() == 2,
        aligned=aligned,
        rows=rows_of(layer),
        batch_invariant=batch_invariant,
    )


def layer_of(given: Arguments) -> Layer:
    """The layer, with x as it is."""
    assert given.post_expert_norm is None, "no kernel has a norm after each expert"
    slots = given.topk_ids.contiguous(), given.topk_weights.contiguous()
    return Layer(given.x, *slots, *given.projections(*given.matrices()), given.act(), given.scale_input)


def readable(layer: Layer, plan: LaunchPlan) -> Layer:
    """The layer; x is copied only where its own strides keep it from being loaded 16 bytes at a time."""
    return layer._replace(x=operands.readable(layer.x, plan.aligned))


def plan_of(layer: Layer, groups: Groups, config: KernelConfig, aligned: bool, *, decoded: bool = False) -> LaunchPlan:
    """How the products run on the layer's device; what is in 4 bits is decoded in them or before them."""
    device = device_of(layer.x.device)
    bounds = bounds_of(groups, config.up.block_m) if decoded else None
    return LaunchPlan(groups, layer.topk_ids.shape[1], config, device, precision_of(layer), aligned, bounds)


def precision_of(layer: Layer) -> str:
    """How products round: "tf32" for fp32 where torch's own setting allows it and Triton has it, else "ieee"."""
    tf32 = layer.x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and device_of(layer.x.device).family != "sm75" else "ieee"


OPERATOR = define(Kernels("triton"))
BATCH_INVARIANT = define(Kernels("triton_batch_invariant", batch_invariant=True, path=FUSED))  # the rule follows rows
TUNED = define(Kernels("triton_tuned", tuned=True))
BY_PATH = {"": OPERATOR} | {path: define(Kernels(f"triton_{path}", path=path)) for path in (FUSED, DECODED)}


def operator_of(path: str) -> Operator:
    """The operator for a way that projections in 4 bits take: "fused", "decoded", or "" for the rule's."""
    return BY_PATH[path]


def path_note(x: Tensor, rows: float | None, path: str = "") -> str:
    """Which way a call with projections in 4 bits takes, and why, in one line.

    Args:
        x: [..., H], tells the device.
        rows: mean rows of an expert, or None if they are not known.
        path: "fused" or "decoded" if that was asked for.
    """
    device = "interpreted on the CPU (TRITON_INTERPRET=1): slow, for numbers only; " if INTERPRETED else ""
    return device + (f"4 bits: {path}, as asked" if path else describe(device_of(x.device).family, rows))
