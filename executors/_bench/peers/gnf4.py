"""grouped-nf4-gemm's products on packed experts, through its public functions: a peer on a GPU, where it is installed.

It has NF4 in blocks of 64 with plain scales, gradients for the rows, and adapters (``nf4_qlora.fused_grouped_lora``);
and MXFP4 forward (``mxfp4_grouped.gemm_mxfp4_grouped``). Both take bytes with the dimension that is summed over last,
rows sorted by expert, and the sizes of groups on the host; so sorting, activation, biases and the sum over slots are
those of the sorted loop. Signatures are those of its documentation of 0.51.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from executors._bench.contenders import Contender
from executors._bench.layers import LORA_SCALING, BenchLayer
from executors._bench.peers.loops import Sizes, activate, on_sorted
from executors._bench.routing import Batch
from executors._compare.report import version_of
from moe_ref.types import MXFP4Tensor, NF4Tensor

NAME = "gnf4"
DISTRIBUTION = "grouped-nf4-gemm"
BLOCKSIZE = 64
NF4_FUNCTION, MXFP4_FUNCTION = ("nf4_qlora", "fused_grouped_lora"), ("mxfp4_grouped", "gemm_mxfp4_grouped")

Product = Callable[[str, Tensor, list[int], list[int]], Tensor]  # projection, rows, sizes of groups, their experts

gnf4_version = partial(version_of, DISTRIBUTION)  # None where it is not installed


def gnf4_peers(layer: BenchLayer) -> list[Contender]:
    """The peer on this layer, usable or with the reason why not; on a CPU it does not take part."""
    if layer.weights().gate_up_proj.device.type == "cpu":
        return []
    if reason := refusal(layer):
        return [Contender(NAME, False, reason=reason)]
    module, name = MXFP4_FUNCTION if _is_mxfp4(layer) else NF4_FUNCTION
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        return [Contender(NAME, False, reason=f"not in this {DISTRIBUTION}: {' '.join(str(error).split())}")]
    return [peer(layer, function)]


def refusal(layer: BenchLayer) -> str:
    """Why it cannot compute this layer, or ""."""
    if gnf4_version() is None:
        return f"{DISTRIBUTION} is not installed"
    if _is_mxfp4(layer):
        return "it has MXFP4 without adapters" if layer.storage.rank else ""
    up = layer.frozen["gate_up_proj"]
    assert isinstance(up, NF4Tensor)
    if up.quant_type != "nf4" or up.blocksize != BLOCKSIZE or up.nested_absmax is not None:
        return f"it has NF4 in blocks of {BLOCKSIZE} with plain scales only"
    if layer.shape.transposed:
        return "it has bytes with the dimension that is summed over last only"
    return ""


def peer(layer: BenchLayer, function: Any) -> Contender:
    """The contender around its function."""
    product = mxfp4_product(layer, function) if _is_mxfp4(layer) else nf4_product(layer, function)
    sizes, config = Sizes(layer.shape.experts), layer.shape.config

    def call(batch: Batch) -> Tensor:
        counts = sizes.read(batch)
        own = [expert for expert, count in enumerate(counts) if count]
        groups = [counts[expert] for expert in own]

        def multiplied(name: str, rows: Tensor) -> Tensor:
            out, bias = product(name, rows, groups, own), layer.frozen.get(f"{name}_proj_bias")
            if bias is None:
                return out
            assert isinstance(bias, Tensor)
            return out + bias[batch.topk_ids.flatten().sort(stable=True).values]

        return on_sorted(batch, lambda rows: multiplied("down", activate(multiplied("gate_up", rows), config)))

    return Contender(NAME, False, call, backward=not _is_mxfp4(layer))


def nf4_product(layer: BenchLayer, function: Any) -> Product:
    """Of NF4, with the adapters that the layer has."""

    def product(name: str, rows: Tensor, sizes: list[int], own: list[int]) -> Tensor:
        stack = layer.frozen[f"{name}_proj"]
        assert isinstance(stack, NF4Tensor)
        experts, m, k = stack.shape
        packed, absmax = stack.packed.view(experts, m, k // 2), stack.absmax.view(experts, m, k // BLOCKSIZE)
        a, b = (layer.parameters.get(f"{name}_lora_{factor}") for factor in "ab")
        return function(rows, packed, absmax, sizes, own, a, b, scaling=LORA_SCALING)

    return product


def mxfp4_product(layer: BenchLayer, function: Any) -> Product:
    """Of MXFP4, which has no gradients."""

    def product(name: str, rows: Tensor, sizes: list[int], own: list[int]) -> Tensor:
        stack = layer.frozen[f"{name}_proj"]
        assert isinstance(stack, MXFP4Tensor)
        return function(rows, torch.flatten(stack.blocks, 2), stack.scales, sizes, own)

    return product


def _is_mxfp4(layer: BenchLayer) -> bool:
    return isinstance(layer.frozen["gate_up_proj"], MXFP4Tensor)
