"""Layers of the benchmark in 4 bits: quantised once, and then the same bytes for all contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from executors._bench.layers import BenchLayer, Storage
from executors._bench.mxfp4 import in_mxfp4
from executors._compare.report import version_of
from executors.nf4 import quantize_tensor
from moe_ref.nf4 import NESTED_BLOCKSIZE
from moe_ref.types import NF4Tensor, PackedTensor
from moe_ref.validation import dtype_name

BLOCKSIZE = 64  # H and I are multiples of it: bitsandbytes 0.50 decodes other rows wrongly on a CPU
PROJECTIONS = ("gate_up_proj", "down_proj")
MXFP4: Final = "mxfp4"
MX_BLOCKSIZE = 32

QuantType = Literal["nf4", "fp4", "mxfp4"]
QUANT_TYPES: tuple[QuantType, ...] = ("nf4", "fp4", "mxfp4")

bitsandbytes_version = partial(version_of, "bitsandbytes")  # None where it is not installed


@dataclass(frozen=True)
class Quantisation:
    """How the projections are quantised.

    Attributes:
        quant_type: "nf4", "fp4" or "mxfp4".
        nested: whether the scales are quantised too; those of MXFP4 always have one byte.
    """

    quant_type: QuantType
    nested: bool = False

    @property
    def blocksize(self) -> int:
        """Numbers that share a scale."""
        return MX_BLOCKSIZE if self.quant_type == MXFP4 else BLOCKSIZE

    @property
    def weight_bytes(self) -> float:
        """Of one number, its share of the scales included."""
        if self.quant_type == MXFP4:
            return 0.5 + 1 / self.blocksize
        scale = 1 + 4 / NESTED_BLOCKSIZE if self.nested else 4
        return 0.5 + scale / self.blocksize

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"blocksize": self.blocksize}

    def __str__(self) -> str:
        nested = ", nested statistics" if self.nested else ""
        return f"{self.quant_type}, blocks of {self.blocksize}{nested}"


def quantised(layer: BenchLayer, how: Quantisation, progress: Callable[[int, int], None]) -> BenchLayer:
    """The layer with both projections in 4 bits, and nothing in it trained.

    bitsandbytes quantises to NF4 and FP4, or `executors.nf4` where it is not installed; `executors.mxfp4` to MXFP4.

    Args:
        layer: with dense projections.
        how: the format.
        progress: called with (experts quantised, experts in all).
    """
    if how.quant_type == MXFP4:
        return in_mxfp4(layer, how.weight_bytes, progress)
    stacks = {name: value.detach() for name, value in layer.parameters.items()}
    count = layer.shape.experts
    packed: dict[str, Tensor | PackedTensor] = {}
    for number, name in enumerate(PROJECTIONS):
        stack = stacks.pop(name)

        def tell(done: int, of: int, before: int = number) -> None:
            progress((before * of + done) * count // (len(PROJECTIONS) * of), count)

        quantise = _by_us if bitsandbytes_version() is None else _by_bitsandbytes
        packed[name] = quantise(stack, how, tell)
    packed.update(stacks)
    return BenchLayer(layer.shape, {}, packed, Storage(how.weight_bytes, frozen=True))


def _by_us(stack: Tensor, how: Quantisation, progress: Callable[[int, int], None]) -> NF4Tensor:
    assert how.quant_type != MXFP4
    return quantize_tensor(stack, how.quant_type, how.blocksize, how.nested, progress=progress)


def _by_bitsandbytes(stack: Tensor, how: Quantisation, progress: Callable[[int, int], None]) -> NF4Tensor:
    """Quantises expert by expert. The bytes are those of the whole stack: no block straddles two experts."""
    assert how.quant_type != MXFP4
    functional = _functional()
    parts = []
    for number, matrix in enumerate(stack):
        packed, state = functional.quantize_4bit(matrix, blocksize=how.blocksize, quant_type=how.quant_type)
        parts.append((packed.view(-1), state.absmax))
        progress(number + 1, len(stack))
    codes, absmax = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    tensor = NF4Tensor(
        codes,
        absmax,
        shape=tuple(stack.shape),
        dtype=dtype_name(stack),
        quant_type=how.quant_type,
        blocksize=how.blocksize,
    )
    if not how.nested:
        return tensor
    offset = absmax.mean()
    scales, state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return replace(
        tensor,
        absmax=scales,
        nested_absmax=state.absmax,
        nested_code=state.code,
        nested_offset=offset,
        nested_blocksize=NESTED_BLOCKSIZE,
    )


def quant_state(tensor: NF4Tensor) -> Any:
    """bitsandbytes' description of the same bytes, without a copy of them."""
    functional = _functional()
    nested = None
    if tensor.nested_absmax is not None:
        nested = functional.QuantState(
            absmax=tensor.nested_absmax, code=tensor.nested_code, blocksize=tensor.nested_blocksize, dtype=torch.float32
        )
    return functional.QuantState(
        absmax=tensor.absmax,
        shape=torch.Size(tensor.shape),
        code=functional.get_4bit_type(tensor.quant_type, device=tensor.device),
        blocksize=tensor.blocksize,
        quant_type=tensor.quant_type,
        dtype=getattr(torch, tensor.dtype),
        offset=tensor.nested_offset,
        state2=nested,
    )


def _functional() -> Any:
    """bitsandbytes takes seconds to import: only where it is needed."""
    from bitsandbytes import functional

    return functional
