"""The custom operators of torch: arguments taken apart, the device's configuration chosen, the layer launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors._operator import Arguments, Kept, define
from executors.triton import _configs, _interpreter, _layer, _operands, _tuned
from executors.triton._configs import Regime
from executors.triton._device import INTERPRETED, device_guard, device_of
from executors.triton._grouping import Groups, group
from executors.triton._layer import Layer, Projection
from executors.triton._operands import Act, Plan
from moe_ref.types import GATED


class Kernels(NamedTuple):
    """The kernels as an operator's implementation.

    Attributes:
        name: of the operator.
        batch_invariant: whether one configuration serves any number of rows (C2).
        tuned: whether tiles that were chosen on this machine replace the shipped ones.
    """

    name: str
    batch_invariant: bool = False
    tuned: bool = False

    @property
    def gradient_format(self) -> torch.memory_format:
        """Gradients have their owners' strides."""
        return torch.preserve_format

    def forward(self, given: Arguments, keep_z: bool, _keep_own: bool) -> tuple[Tensor, Kept]:
        """y [T, H]; z is all that a backward pass takes."""
        if not given.topk_ids.numel():
            return self.fake(given, keep_z, False)
        if INTERPRETED:
            _interpreter.mend()
        layer = layer_of(given)
        with device_guard(given.x):
            y, z = _layer.forward(layer, self._plan(layer), keep_z)
        return y, self._kept(z)

    def fake(self, given: Arguments, keep_z: bool, _keep_own: bool) -> tuple[Tensor, Kept]:
        """Tensors of the same shapes."""
        x, slots = given.x, given.topk_ids.numel()
        z = x.new_empty(slots if keep_z else 0, given.gate_up_proj.shape[1])
        return torch.empty_like(x, memory_format=torch.contiguous_format), self._kept(z)

    def backward(self, given: Arguments, kept: Kept, dy: Tensor, needs: dict[str, bool]) -> dict[str, Tensor]:
        """The gradients that are needed."""
        if not given.topk_ids.numel():
            return _layer.zeros(given.owners(), needs)
        if INTERPRETED:
            _interpreter.mend()
        layer = layer_of(given)
        with device_guard(given.x):
            plan = self._plan(layer)
            return _layer.backward(layer, plan, kept.z.contiguous(), _operands.readable(dy, plan.aligned), needs)

    def _kept(self, z: Tensor) -> Kept:
        """Slots are sorted anew in backward: hooks may hand back weights with other strides, and so other tiles."""
        return Kept(z, *(z.new_empty(0) for _ in Kept._fields[1:]))

    def _plan(self, layer: Layer) -> Plan:
        regime = self._regime(layer)
        return plan_of(layer, group(layer.topk_ids, layer.num_experts, regime.up.block_m), regime)

    def _regime(self, layer: Layer) -> Regime:
        if self.tuned:
            return _tuned.regime_for(layer, precision_of(layer)) or shipped_regime(layer)
        return shipped_regime(layer, batch_invariant=self.batch_invariant)


def shipped_regime(layer: Layer, *, batch_invariant: bool = False) -> Regime:
    """The configuration that ships with this package."""
    return _configs.regime_of(
        device_of(layer.x.device).family,
        narrow=layer.x.element_size() == 2,
        aligned=_operands.are_aligned(layer.up.matrices, layer.down.matrices),
        rows=layer.topk_ids.numel() / layer.num_experts,
        batch_invariant=batch_invariant,
    )


def layer_of(given: Arguments) -> Layer:
    """The layer; x is copied only where its own strides keep it from being loaded 16 bytes at a time."""
    factors = (given.gate_up_lora_a, given.gate_up_lora_b), (given.down_lora_a, given.down_lora_b)
    up = Projection(given.gate_up_proj, given.gate_up_proj_bias, *factors[0], given.gate_up_scaling)
    down = Projection(given.down_proj, given.down_proj_bias, *factors[1], given.down_scaling)
    layout = given.layout if given.activation in GATED else ""
    return Layer(
        _operands.readable(given.x, _operands.are_aligned(given.gate_up_proj, given.down_proj)),
        given.topk_ids.contiguous(),
        given.topk_weights.contiguous(),
        up,
        down,
        Act(given.activation, given.alpha, given.limit, given.up_offset, layout),
        given.scale_input,
    )


def plan_of(layer: Layer, groups: Groups, regime: Regime) -> Plan:
    """How the products run on the layer's device."""
    aligned = _operands.are_aligned(layer.up.matrices, layer.down.matrices)
    device = device_of(layer.x.device)
    return Plan(groups, layer.topk_ids.shape[1], regime, device, precision_of(layer), aligned)


def precision_of(layer: Layer) -> str:
    """How products round: "tf32" for fp32 where torch's own setting allows it, else "ieee"."""
    tf32 = layer.x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


OPERATOR = define(Kernels("triton"))
BATCH_INVARIANT = define(Kernels("triton_batch_invariant", batch_invariant=True))
TUNED = define(Kernels("triton_tuned", tuned=True))
