"""Contenders that are an executor in one of its ways, named ``executor[way]``.

In 4 bits each path of ``grouped_nf4`` that this machine can take is a contender; outside the benchmark a rule chooses
among them. ``triton[bf16]`` is what 4 bits must beat: the same layer decoded beforehand, in bf16.
"""

from __future__ import annotations

from typing import get_args

import torch

import executors
from executors._bench.case import DENSE_WEIGHTS
from executors._bench.layers import BenchLayer
from executors._decode import decode_expert
from executors._decode.paths import Path
from executors._protocol import Unavailable, Unsupported
from moe_ref.types import MoEWeights, PackedTensor

GROUPED, TRITON = "grouped_nf4", "triton"
TORCH = "torch"
PATHS: tuple[Path, ...] = tuple(path for path in get_args(Path) if path != "auto")


def known() -> list[str]:
    """The names that ``--executor`` takes in 4 bits, besides those of executors."""
    return [*(path_name(path) for path in PATHS), DENSE_WEIGHTS]


def path_name(path: str) -> str:
    """Of the contender that takes a path."""
    return f"{GROUPED}[{path}]"


def expanded(names: list[str], layer: BenchLayer, admit_interpreted: bool) -> list[str]:
    """The names with ``grouped_nf4`` replaced by its paths, where there is more than one here.

    Args:
        names: of executors and ways.
        layer: the layer.
        admit_interpreted: whether paths whose kernels are interpreted count.
    """
    found: list[str] = []
    for name in names:
        paths = paths_here(layer, admit_interpreted) if name == GROUPED and layer.weights().packed() else []
        found += [path_name(path) for path in paths] if len(paths) > 1 else [name]
    return found


def paths_here(layer: BenchLayer, admit_interpreted: bool) -> list[str]:
    """The paths that this machine can take on the layer's device."""
    device = layer.weights().gate_up_proj.device.type
    found: list[str] = []
    for path in PATHS:
        try:
            able = executors.get(GROUPED, path=path).capabilities
        except Unavailable:
            continue
        if device in able.devices and (admit_interpreted or not able.interpreted):
            found.append(path)
    return found


def executor_of(name: str) -> executors.Executor:
    """The executor behind a contender's name.

    Raises:
        Unavailable: it cannot be had here.
    """
    plain, _, way = name.rstrip("]").partition("[")
    return executors.get(plain, path=way) if way and name != DENSE_WEIGHTS else executors.get(plain)


def refusal_of(name: str, x: torch.Tensor, layer: BenchLayer) -> str:
    """Why that contender cannot take the layer, or ""."""
    try:
        executor = executor_of(name)
        if name != DENSE_WEIGHTS:  # it decodes its weights at its first call
            executor.check(x, layer.weights())
    except (Unavailable, Unsupported) as error:
        return " ".join(str(error).split())
    return ""


def weights_of(name: str, layer: BenchLayer) -> MoEWeights:
    """The layer's weights as that contender takes them."""
    weights = layer.weights()
    return weights.with_parameters(dense_stacks(layer)) if name == DENSE_WEIGHTS else weights


def dense_stacks(layer: BenchLayer) -> dict[str, torch.Tensor]:
    """Both projections decoded, in canonical shapes. The layer keeps them: they take four times its memory."""
    for name, stack in layer.frozen.items():
        if isinstance(stack, PackedTensor) and name not in layer.decoded:
            dense = torch.empty(stack.stored_shape, dtype=getattr(torch, stack.dtype), device=stack.device)
            layer.decoded[name] = dense.transpose(1, 2) if stack.transposed else dense
            for index, matrix in enumerate(layer.decoded[name]):
                matrix.copy_(decode_expert(stack, index))
    return {name: layer.canonical(name, dense) for name, dense in layer.decoded.items()}
