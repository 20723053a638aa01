"""Runs a small layer on the CPU as it is compiled for sm80, and counts what its kernels do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from executors import mxfp4, nf4
from executors._base.arguments import Activation, Projection
from executors._base.operator import NAMES
from executors._bench.layers import Shape
from executors._counts.fit import Counts, Sizes, added
from executors._triton import configs
from executors._triton.configs import KernelConfig
from executors._triton.decode_rule import DECODED, path_of
from executors._triton.device import Device
from executors._triton.launch.grouping import bounds_of, group
from executors._triton.launch.operands import LaunchPlan, Matrices, are_aligned
from executors._triton.layer import Layer, backward, forward
from moe_ref.conformance.ptx.counters import KernelCounts
from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.launch import How
from moe_ref.types import LORA_FACTORS, QuantType

TARGET = "sm80"  # the only one whose text can be executed
COUNTED = How(counts=True)
FORMATS: dict[str, tuple[QuantType, bool] | None] = {
    "nf4": ("nf4", False),
    "nf4-nested": ("nf4", True),
    "fp4": ("fp4", False),
    "mxfp4": None,
}
BLOCKSIZE = 64
BACKWARD = {
    "up": "dh",
    "down": "dx",
    "combine": "combine dx",
    "decode": "decode back",
}  # the same kernels in the backward pass
GRADIENTS = ("outer", "sums")  # launched for the down projection, then for the up projection


@dataclass(frozen=True)
class Slice:
    """What is counted: a layer whose experts all have the same number of rows.

    Attributes:
        shape: the layer's configuration; its sizes are not used.
        sizes: of the slice.
        rows: of each expert.
        dtype: of x.
        packed: a name of `FORMATS`, or "" for dense weights.
        backward: whether the backward pass is counted too, with gradients of all but weights in 4 bits.
    """

    shape: Shape
    sizes: Sizes
    rows: int
    dtype: torch.dtype
    packed: str
    backward: bool

    @property
    def decoded(self) -> bool:
        """Whether weights are decoded before the products."""
        return bool(self.packed) and path_of(TARGET, self.rows) == DECODED

    def config(self, aligned: bool) -> KernelConfig:
        """The tiles."""
        fused, narrow = bool(self.packed) and not self.decoded, self.dtype.itemsize == 2
        return configs.config_of(
            TARGET, narrow=narrow, aligned=aligned, rows=self.rows, batch_invariant=False, packed=fused
        )


def count(own: Slice) -> Counts:
    """The counts of the slice's kernels, but for those that sort and those that sum slots."""
    layer = _layer(own)
    aligned = are_aligned(layer.up.matrices, layer.down.matrices, decoded=own.decoded)
    config = own.config(aligned)
    with executed(TARGET):
        groups = group(layer.topk_ids, own.sizes.experts, config.up.block_m)
    bounds = bounds_of(groups, config.up.block_m) if own.decoded else None
    device = Device(TARGET, own.sizes.multiprocessors)
    plan = LaunchPlan(groups, own.shape.top_k, config, device, "ieee", aligned, bounds)
    with executed(TARGET, COUNTED) as ran:
        y, z = forward(layer, plan, keep_z=own.backward)
        of_forward = len(ran.counts)
        if own.backward:
            frozen = {*LORA_FACTORS, *(("gate_up_proj", "down_proj") if own.packed else ())}
            backward(layer, plan, z, torch.ones_like(y), {name: name not in frozen for name in NAMES})
    found = labelled(ran.counts[:of_forward], ran.counts[of_forward:])
    return {label: counts for label, counts in found.items() if not label.startswith("combine")}


def labelled(of_forward: list[KernelCounts], of_backward: list[KernelCounts]) -> Counts:
    """Counts by a name for each step of the layer; launches of one step that differ in nothing are one."""
    out: Counts = {}
    for number, own in enumerate([*of_forward, *of_backward]):
        label = own.kernel.removesuffix("_kernel")
        if number >= len(of_forward):
            label = BACKWARD.get(label, label)
        if label in GRADIENTS:
            label = f"{label} down" if f"{label} down" not in out else f"{label} up"
        while label in out and not _same_text(out[label], own):
            label += "'"
        out[label] = added(out[label], own) if label in out else own
    return out


def _same_text(a: KernelCounts, b: KernelCounts) -> bool:
    return [(i.line, i.name) for i in a.instructions] == [(i.line, i.name) for i in b.instructions]


def _layer(own: Slice) -> Layer:
    experts, hidden, intermediate, _ = own.sizes
    config, top_k = own.shape.config, own.shape.top_k
    tokens = own.rows * experts // top_k
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)

    def projection(m: int, k: int) -> Projection[Matrices]:
        by_columns = own.shape.transposed and own.packed != "mxfp4"
        stored = draw(experts, *((k, m) if by_columns else (m, k))).div_(k**0.5).to(own.dtype)
        matrices = packed(stored, own.packed)
        bias = draw(experts, m).to(own.dtype) if own.shape.biases else None
        return Projection(matrices.transpose(1, 2) if by_columns else matrices, bias, None, None, 1.0)

    act = Activation(
        config.activation,
        config.alpha,
        config.limit,
        config.up_offset,
        config.gate_up_layout if config.gated else "",
        config.clamp,
        config.gate_softcap,
        config.up_softcap,
    )
    ids = (torch.arange(tokens * top_k, dtype=torch.int32) % experts).view(tokens, top_k)
    up = projection(2 * intermediate if config.gated else intermediate, hidden)
    x, weights = draw(tokens, hidden).to(own.dtype), torch.rand(tokens, top_k, generator=generator)
    return Layer(x, ids, weights, up, projection(hidden, intermediate), act, config.scale_input)


def packed(stored: Tensor, kind: str) -> Matrices:
    """Matrices in a format of `FORMATS`, in the same order in memory."""
    if not kind:
        return stored
    form = FORMATS[kind]
    if form is None:
        return mxfp4.quantize_tensor(stored)
    quant_type, nested = form
    return nf4.quantize_tensor(stored, quant_type, BLOCKSIZE, nested)
