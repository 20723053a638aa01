"""Random tensors in 4 bits for the tests of NF4 and FP4, and bitsandbytes' answer for them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from moe_ref.nf4 import decode, dynamic_code
from moe_ref.types import NF4Tensor

DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
TYPES = st.sampled_from(["nf4", "fp4"])
BLOCKSIZES = st.sampled_from([64, 32, 128, 256, 512, 1024, 2048, 4096])
SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 32, 33, 48, 64, 66, 96, 100, 128, 160, 192, 256, 1000]))
WILD = np.array(
    [0.0, 2.0**-149, 2.0**-127, 2.0**-126, 1e-38, 6e-8, 3e4, 1e5, 1e38, 3.4e38, np.inf, np.nan, -1.0, 0.3, 0.7],
    dtype=np.float32,
)


def numbers(rng: np.random.Generator, count: int, wild: bool) -> np.ndarray:
    normal = np.abs(rng.standard_normal(count)).astype(np.float32)
    return np.where(rng.random(count) < 0.7, rng.choice(WILD, count), normal) if wild else normal


@st.composite
def tensors(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3), segments: bool = False) -> NF4Tensor:
    """Any bytes with any scales: tame or wild, plain or nested, with ``segments`` perhaps one for each expert."""
    rank = draw(st.sampled_from(ranks), label="rank")
    lengths = st.integers(1, 6) if rank == 3 else LENGTHS
    shape = (*(draw(lengths, label="length") for _ in range(rank - 1)), draw(LENGTHS, label="last length"))
    blocksize = draw(BLOCKSIZES, label="blocksize")
    nested = draw(st.booleans(), label="nested")
    wild = draw(st.booleans(), label="wild")
    own = nested and segments and rank == 3 and draw(st.booleans(), label="segments")
    if own:
        shape = (shape[0], shape[1], ceil(shape[2] / blocksize) * blocksize)
    rng = np.random.default_rng(draw(SEEDS, label="seed"))
    count = prod(shape)
    blocks, experts = ceil(count / blocksize), shape[0] if own else 1
    plain = NF4Tensor(
        rng.integers(0, 256, ceil(count / 2), dtype=np.uint8),
        numbers(rng, blocks, wild),
        shape=shape,
        dtype=draw(DTYPES, label="dtype"),
        quant_type=draw(TYPES, label="quant_type"),
        blocksize=blocksize,
        transposed=rank == 3 and draw(st.booleans(), label="transposed"),
    )
    if not nested:
        return plain
    return replace(
        plain,
        absmax=rng.integers(0, 256, blocks, dtype=np.uint8),
        nested_absmax=numbers(rng, experts * ceil(blocks / experts / 256), wild),
        nested_code=np.array(dynamic_code(), dtype=np.float32),
        nested_offset=numbers(rng, experts, wild).reshape((experts,) if own else ()),
    )


def in_torch(tensor: NF4Tensor, device: str = "cpu") -> NF4Tensor:
    return tensor.map(partial(torch.tensor, device=device))


def on_cpu(array: torch.Tensor) -> np.ndarray:
    return array.cpu().numpy()


def decoded(tensor: NF4Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(decode(tensor))


def as_stored(tensor: NF4Tensor) -> np.ndarray:
    """Decoded, in one row, in the order of the bytes."""
    return decoded(tensor.transpose(-1, -2) if tensor.transposed else tensor).reshape(-1)


def equal_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two fp32 arrays agree to the last bit, the sign of a zero included; one NaN is as good as another."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype == np.float32
    return (a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))


def library_decodes(library: Any, tensor: NF4Tensor, device: str = "cpu") -> np.ndarray:
    """What bitsandbytes' ``dequantize_4bit`` makes of the bytes, as they are stored, in one row.

    Args:
        library: bitsandbytes.functional.
        tensor: of more than one byte; the library transposes if it is one.
        device: where.
    """
    t = in_torch(tensor, device)
    code = library.get_4bit_type(t.quant_type, device=device)
    form = {"code": code, "blocksize": t.blocksize, "quant_type": t.quant_type, "dtype": getattr(torch, t.dtype)}
    state = library.QuantState(absmax=t.absmax, shape=torch.Size(t.stored_shape), **form)
    if t.nested_absmax is not None:
        inner = {"absmax": t.nested_absmax, "code": t.nested_code, "dtype": torch.float32}
        state.state2, state.offset, state.nested = library.QuantState(blocksize=256, **inner), t.nested_offset, True
    return on_cpu(library.dequantize_4bit(t.packed[:, None], state).float()).reshape(-1)
