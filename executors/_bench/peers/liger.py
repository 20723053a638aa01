"""liger-kernel's routed experts, through its public function.

It has swiglu without clamp on concatenated gate and up rows, dense stacks without biases, and gradients of everything;
routing is outside. Its kernels are tuned by trial at the first call for each H and I, whatever that call's T: so one
call with many tokens comes before all others. It waits for the GPU once in a forward pass, so no graph captures it.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from executors._bench.case import FORWARD, WITH_BACKWARD
from executors._bench.contenders import Contender, action_of
from executors._bench.judge import clear_gradients
from executors._bench.layers import BenchLayer
from executors._bench.routing import Batch, batch
from executors._compare.report import version_of

NAME = "liger"
DISTRIBUTION = "liger-kernel"
TUNED_AT = 4096  # tokens

liger_version = partial(version_of, DISTRIBUTION)  # None where it is not installed


def liger_peers(layer: BenchLayer) -> list[Contender]:
    """liger-kernel on this layer, usable or with the reason why not; on a CPU it does not take part."""
    device = layer.weights().gate_up_proj.device
    if device.type == "cpu":
        return []
    if reason := _refusal(layer):
        return [Contender(NAME, False, reason=reason)]
    try:
        function = import_module("liger_kernel.ops").LigerFusedMoEFunction
    except (ImportError, AttributeError) as error:
        return [Contender(NAME, False, reason=f"not in this {DISTRIBUTION}: {' '.join(str(error).split())}")]
    return [peer(layer, function)]


def peer(layer: BenchLayer, function: Any) -> Contender:
    """The contender around liger's function."""

    def call(given: Batch) -> Tensor:
        weights = layer.weights()
        ids = given.topk_ids.to(torch.int32)
        return function.apply(given.x, weights.gate_up_proj, weights.down_proj, ids, given.topk_weights)

    def prepare() -> None:
        given = batch("uniform", TUNED_AT, 0, layer.shape, str(layer.weights().gate_up_proj.device), 0)
        for direction in (FORWARD, WITH_BACKWARD):
            action_of(call, given, direction)()
            clear_gradients(layer, given)

    return Contender(NAME, False, call, prepare=prepare)


def _refusal(layer: BenchLayer) -> str:
    """Why it cannot compute this layer, or ""."""
    config, shape = layer.shape.config, layer.shape
    if liger_version() is None:
        return f"{DISTRIBUTION} is not installed"
    if config.activation != "swiglu" or config.limit is not None or config.up_offset or config.alpha != 1.0:
        return "it has swiglu only, without clamp and offset"
    if config.gate_up_layout != "concatenated" or config.scale_input:
        return "it has concatenated gate and up rows only, and weights on outputs"
    if shape.biases:
        return "it has no biases"
    if shape.transposed:
        return "it would copy transposed stacks in every call"
    return ""
