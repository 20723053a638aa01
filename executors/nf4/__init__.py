"""Weights in 4 bits, in bitsandbytes' format: quantise, convert, join, save, load (docs/nf4-weights.md).

`quantize` and `quantize_tensor` need only torch and give the bits of clause Q4. Other functions take over existing
4-bit tensors, without a copy: bitsandbytes' quantised tensors (`from_quant_state`), one linear layer per expert
(`from_linears`), and state dicts in the form that bitsandbytes writes (`from_state_dict`). `fuse` joins gate and up
projections that are stored apart. They refuse what they cannot take over exactly. Nothing is quantised twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from executors._decode.dense import check_dense, decoded_dtype
from executors._progress import Progress, check_progress, reporter
from executors.nf4.convert import from_linears, from_quant_state, unnest
from executors.nf4.file import load, save
from executors.nf4.fuse import fuse
from executors.nf4.quantization import quantized
from executors.nf4.state_dict import from_state_dict, to_state_dict
from moe_ref.types import PROJECTIONS, MoEWeights, NF4Tensor, QuantType
from moe_ref.validation import check_quantize, check_weights

__all__ = [
    "from_linears",
    "from_quant_state",
    "from_state_dict",
    "fuse",
    "load",
    "quantize",
    "quantize_tensor",
    "save",
    "to_state_dict",
    "unnest",
]


def quantize(
    weights: MoEWeights,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    *,
    dtype: torch.dtype | str | None = None,
    progress: Progress = None,
) -> MoEWeights:
    """Quantises both projections of a layer to 4 bits and keeps everything else (clause Q4).

    It works on the device of the weights, in pieces. Beside the result it needs tens of megabytes on a CPU and a few
    hundred elsewhere, however large the projection is. A contiguous projection is quantised in its own order. A
    transposed view of a contiguous one, as in models that store (E, H, 2I), is quantised in storage order and read
    transposed. Any other projection (sliced, expanded) is quantised in its logical order, made contiguous piece by
    piece. The result holds no gradient. Sources: Dettmers et al. 2023 (arXiv:2305.14314); bitsandbytes 0.50.

    Args:
        weights: projections [E, 2I, H] (or [E, I, H]) and [E, H, I] in fp32, bf16 or fp16; finite.
        quant_type: "nf4" or "fp4".
        blocksize: numbers that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        nested: whether the scales are quantised too: to 8 bits, in one segment. Saves 0.37 bits per number at 64.
        dtype: the dtype to decode to: fp32, bf16 or fp16, as a torch.dtype or its name; default: the projections' own.
        progress: None; a callable (done, total) that counts the numbers of both projections; or True for a bar on
            stderr, which needs rich.

    Returns:
        New weights with `moe_ref.NF4Tensor` projections.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed; also for a projection that
            is in 4 bits already, is in fp64, or has NaN or infinite elements.
        ModuleNotFoundError: ``progress=True`` without rich.
    """
    check_weights(weights)
    projections = {name: getattr(weights, name) for name in PROJECTIONS}
    packed: dict[str, Any] = _quantize(projections, quant_type, blocksize, nested, dtype, progress)
    return replace(weights, **packed)


def quantize_tensor(
    values: Tensor,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    *,
    dtype: torch.dtype | str | None = None,
    progress: Progress = None,
) -> NF4Tensor:
    """Quantises one tensor to 4 bits, as `quantize` does.

    Args:
        values: of any shape, in fp32, bf16 or fp16; finite.
        quant_type: "nf4" or "fp4".
        blocksize: numbers that share a scale, as for `quantize`.
        nested: whether the scales are quantised too.
        dtype: the dtype to decode to; default: its own.
        progress: None, True, or a callable (done, total), as for `quantize`.

    Raises:
        ValueError, TypeError, ModuleNotFoundError: as `quantize`.
    """
    return _quantize({"values": values}, quant_type, blocksize, nested, dtype, progress)["values"]


def _quantize(
    dense: dict[str, Tensor],
    quant_type: QuantType,
    blocksize: int,
    nested: bool,
    dtype: torch.dtype | str | None,
    progress: Progress,
) -> dict[str, NF4Tensor]:
    for name, values in dense.items():
        check_dense(name, values)
    decoded = {name: decoded_dtype(values, dtype) for name, values in dense.items()}
    for name, values in dense.items():
        check_quantize(values, decoded[name], quant_type, blocksize, nested, name)
    check_progress(progress)
    form: dict[str, Any] = {"quant_type": quant_type, "blocksize": int(blocksize), "nested": nested}
    found, before = {}, 0
    with reporter(progress, sum(values.numel() for values in dense.values())) as tell, torch.no_grad():
        tell(0)
        for name, values in dense.items():
            found[name] = quantized(name, values, dtype=decoded[name], done=_from(before, tell), **form)
            before += values.numel()
    return found


def _from(before: int, tell: Callable[[int], object]) -> Callable[[int], object]:
    return lambda done: tell(before + done)
