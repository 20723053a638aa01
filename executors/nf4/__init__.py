"""Weights in 4 bits, in bitsandbytes' format: quantise, convert, join, save, load (docs/nf4-weights.md).

`quantize` and `quantize_tensor` need nothing but torch; the bits are those of clause Q4. Whatever else has a 4-bit
tensor hands it over without a copy: bitsandbytes' quantised tensors (`from_quant_state`), one linear layer per expert
(`from_linears`), and state dicts in the form that bitsandbytes writes (`from_state_dict`). What cannot be taken over
exactly is refused; nothing is quantised twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from executors._progress import Progress, check_progress, reporter
from executors.nf4.convert import from_linears, from_quant_state, unnest
from executors.nf4.file import load, save
from executors.nf4.quantization import quantized
from executors.nf4.state_dict import DTYPES, from_state_dict, to_state_dict
from moe_ref.types import MoEWeights, NF4Tensor, PackedTensor, QuantType
from moe_ref.validation import check_quantize, check_weights, dtype_name

__all__ = [
    "from_linears",
    "from_quant_state",
    "from_state_dict",
    "load",
    "quantize",
    "quantize_tensor",
    "save",
    "to_state_dict",
    "unnest",
]

PROJECTIONS = ("gate_up_proj", "down_proj")


def quantize(
    weights: MoEWeights,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    *,
    dtype: torch.dtype | str | None = None,
    progress: Progress = None,
) -> MoEWeights:
    """The layer with both projections in 4 bits, and everything else as it is (clause Q4).

    On the device of the weights, in pieces: beside the result it needs tens of megabytes on a CPU, and a few hundred
    elsewhere, however large the projection is. A projection that is a transposed view of a contiguous one, as models
    have it that keep (E, H, 2I), is quantised in the order in which it is stored, and is read transposed; a contiguous
    one in its own order; any other (sliced, expanded) in its logical order, made contiguous piece by piece. The
    result holds no gradient. Sources: Dettmers et al. 2023 (arXiv:2305.14314); bitsandbytes 0.50.

    Args:
        weights: projections [E, 2I, H] (or [E, I, H]) and [E, H, I] in fp32, bf16 or fp16; finite.
        quant_type: "nf4" or "fp4".
        blocksize: numbers with a common scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        nested: whether the scales are quantised too, to 8 bits, in one segment: 0.37 bits less per number at 64.
        dtype: fp32, bf16 or fp16, what it decodes to, as a torch.dtype or its name; default: the projections' own.
        progress: None; a callable (done, total), both in numbers quantised of both projections; or True, a bar on
            stderr, which needs rich.

    Returns:
        New weights, whose projections are `moe_ref.NF4Tensor`.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed; among them a projection
            that is in 4 bits already, is in fp64, or has NaN or infinite elements.
        ModuleNotFoundError: ``progress=True`` without rich.
    """
    check_weights(weights)
    projections = {name: getattr(weights, name) for name in PROJECTIONS}
    for name, values in projections.items():
        _check_dense(name, values)
    packed = _quantize(projections, quant_type, blocksize, nested, dtype, progress)
    return replace(weights, gate_up_proj=packed["gate_up_proj"], down_proj=packed["down_proj"])


def quantize_tensor(
    values: Tensor,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    *,
    dtype: torch.dtype | str | None = None,
    progress: Progress = None,
) -> NF4Tensor:
    """One tensor in 4 bits, as `quantize` does it.

    Args:
        values: of any shape, in fp32, bf16 or fp16; finite.
        quant_type: "nf4" or "fp4".
        blocksize: numbers with a common scale, as for `quantize`.
        nested: whether the scales are quantised too.
        dtype: what it decodes to; default: its own.
        progress: None, True, or a callable (done, total), as for `quantize`.

    Raises:
        ValueError, TypeError, ModuleNotFoundError: as `quantize`.
    """
    _check_dense("values", values)
    return _quantize({"values": values}, quant_type, blocksize, nested, dtype, progress)["values"]


def _quantize(
    dense: dict[str, Tensor],
    quant_type: QuantType,
    blocksize: int,
    nested: bool,
    dtype: torch.dtype | str | None,
    progress: Progress,
) -> dict[str, NF4Tensor]:
    decoded: Any = {name: dtype_name(values) for name, values in dense.items()}
    if dtype is not None:
        named = str(dtype).rpartition(".")[2] if isinstance(dtype, torch.dtype) else dtype
        decoded = dict.fromkeys(dense, named)
    for name, values in dense.items():
        check_quantize(values, decoded[name], quant_type, blocksize, nested)
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


def _check_dense(name: str, values: Any) -> None:
    if isinstance(values, PackedTensor):
        kind = type(values).__name__
        raise TypeError(f"{name} is an {kind}: must be a dense tensor, since nothing is quantised twice")
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__module__}.{type(values).__name__}: must be a torch.Tensor")
    if dtype_name(values) not in DTYPES:
        raise TypeError(f"{name}.dtype={dtype_name(values)}: must be one of {', '.join(DTYPES)}")
