"""Takes over tensors that bitsandbytes quantised, with the same bytes, and joins them where that is exact (Q5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from executors.nf4.codes import CODES, code_table, same_bits
from moe_ref.types import NF4Tensor
from moe_ref.validation import check_nf4
from moe_ref.validation.nf4 import NESTED

QUANT_STATE = ("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2")
SAME = ("shape", "dtype", "quant_type", "blocksize", "nested_blocksize", "device")


def from_quant_state(packed: Tensor, quant_state: Any, *, transposed: bool = False) -> NF4Tensor:
    """Takes over a tensor that bitsandbytes quantised, from its bytes and its ``QuantState``, without a copy.

    Only attributes of the state are read, and the state is not changed. bitsandbytes need not be installed.

    Args:
        packed: the codes, contiguous, of any shape and dtype: bitsandbytes packs them into ``quant_storage``.
        quant_state: a ``bitsandbytes.functional.QuantState``, with or without nested statistics.
        transposed: whether the state's shape, which is that of the stored bytes, is (E, H, 2I), and the tensor is to
            be read as (E, 2I, H). A shape does not tell.

    Raises:
        ValueError, TypeError: one line naming what is wrong, and what is allowed; also for codes with other numbers
            than NF4's or FP4's, and for weights that were repacked for inference on a CPU.
    """
    if hasattr(quant_state, "packing_format_for_cpu"):  # even False: bytes are in order again, absmax stays rounded
        raise ValueError(
            f"quant_state.packing_format_for_cpu={quant_state.packing_format_for_cpu}: must not be there: bitsandbytes "
            "repacked these weights for inference on a CPU, and rounded their absmax to bfloat16 (load them anew)"
        )
    missing = [name for name in QUANT_STATE if not hasattr(quant_state, name)]
    if missing:
        allowed = f"must be a bitsandbytes QuantState, but has no {missing[0]}"
        raise TypeError(f"quant_state={shown(quant_state)}: {allowed}")
    quant_type, code = quant_state.quant_type, quant_state.code
    if not isinstance(quant_type, str) or quant_type not in CODES:
        raise ValueError(f"quant_state.quant_type={quant_type!r:.60}: must be one of {', '.join(map(repr, CODES))}")
    if not isinstance(code, Tensor) or code.dtype != torch.float32:
        raise TypeError(f"quant_state.code={shown(code)}: must be a tensor of float32")
    if not same_bits(code, code_table(quant_type, code.device)):
        raise ValueError(f"quant_state.code={code.tolist()!r:.60}: must be the 16 numbers of {quant_type}, bit for bit")
    tensor = view_of_state(packed, quant_state)
    expected = ceil(tensor.size / 2)
    if tensor.packed.shape[0] != expected:
        allowed = f"must be {expected}, two of the {tensor.size} codes of quant_state.shape={tensor.shape} to a byte"
        raise ValueError(f"packed has {tensor.packed.shape[0]} bytes: {allowed}")
    check_nf4("quant_state", tensor)
    return read_transposed(tensor, transposed)


def view_of_state(packed: Tensor, quant_state: Any) -> NF4Tensor:
    """The tensor of `from_quant_state`, of a state that it has checked before: nothing here waits for a device."""
    tensor = NF4Tensor(
        bytes_of("packed", packed),
        quant_state.absmax,
        shape=tuple(quant_state.shape or ()),
        dtype=str(quant_state.dtype).rpartition(".")[2],
        quant_type=quant_state.quant_type,
        blocksize=quant_state.blocksize,
    )
    if quant_state.state2 is None:
        return tensor
    return _with_state2(tensor, quant_state.offset, quant_state.state2)


def shown(value: Any) -> str:
    """A value for a message: one line, cut if it is long."""
    return f"{' '.join(repr(value).split()):.60}"


def _with_state2(tensor: NF4Tensor, offset: Tensor, state2: Any) -> NF4Tensor:
    dtype = str(state2.dtype).rpartition(".")[2]
    if dtype != "float32":
        raise ValueError(f"quant_state.state2.dtype={dtype}: must be float32")
    return replace(
        tensor,
        nested_absmax=state2.absmax,
        nested_code=state2.code,
        nested_offset=offset,
        nested_blocksize=state2.blocksize,
    )


def bytes_of(name: str, packed: Any) -> Tensor:
    """[bytes] uint8: the same memory as a plain tensor (integers have no gradient)."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}={shown(packed)}: must be a torch.Tensor")
    ordinary = type(packed) in (Tensor, nn.Parameter)  # what is traced must not be cast
    plain = packed.detach() if ordinary else packed.as_subclass(Tensor)
    if not plain.is_contiguous():
        raise ValueError(f"{name}.stride()={plain.stride()}: must be contiguous")
    return plain.view(-1).view(torch.uint8)


def read_transposed(tensor: NF4Tensor, transposed: bool) -> NF4Tensor:
    """The tensor itself, or read with its last two dimensions swapped."""
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed={shown(transposed)}: must be True or False")
    if transposed and tensor.ndim < 2:
        raise ValueError(f"transposed=True: must be False for a tensor of shape {tensor.shape}")
    return tensor.transpose(-2, -1) if transposed else tensor


def from_linears(linears: Iterable[Any]) -> NF4Tensor:
    """One projection (E, out, in) from one quantised linear layer per expert, in their order.

    The bytes are joined unchanged. That is exact only if the numbers of each expert are a multiple of blocksize;
    otherwise blocks would straddle experts (Q5). Nested statistics become one segment per expert, each with its own
    offset. Biases are not read.

    Args:
        linears: ``bitsandbytes.nn.Linear4bit`` modules, or pairs (packed, QuantState); they must agree in
            shape, dtype, quant_type, blocksize, device, and in having nested statistics.

    Raises:
        ValueError, TypeError: one line naming the expert by its index, the reason, and what is allowed.
    """
    if not isinstance(linears, Iterable) or isinstance(linears, Tensor):
        raise TypeError(f"linears is a {type(linears).__name__}: must be a list of Linear4bit, one for each expert")
    tensors = []
    for index, linear in enumerate(linears):
        try:
            tensors.append(_from_linear(linear))
        except (ValueError, TypeError) as error:
            raise type(error)(f"linears[{index}]: {error}") from error
    if not tensors:
        raise ValueError("linears is empty: must have at least one expert")
    return join(tensors, "linears[{}]".format)


def _from_linear(linear: Any) -> NF4Tensor:
    if isinstance(linear, tuple) and len(linear) == 2:
        return from_quant_state(*linear)
    if not hasattr(linear, "weight"):
        raise TypeError(f"{shown(linear)} has no weight: must be a Linear4bit, or a pair (packed, QuantState)")
    state = getattr(linear.weight, "quant_state", None)
    state = getattr(linear, "quant_state", None) if state is None else state  # wrapping loses it, the module keeps it
    if state is None:
        raise ValueError("weight.quant_state=None: must be quantised (moving a Linear4bit to a device does that)")
    return from_quant_state(linear.weight, state)


def join(tensors: Sequence[NF4Tensor], name: Callable[[int], str]) -> NF4Tensor:
    """[E, ...] Joins experts of one form under a new first dimension; a single expert keeps its bytes without a copy.

    Args:
        tensors: at least one, each of one segment, checked, not transposed.
        name: gives the name of an expert in a message, by its index.

    Raises:
        ValueError: the experts differ in form, or joining them would not be exact.
    """
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        _check_alike(name(index), tensor, name(0), first)
    shape = (len(tensors), *first.shape)
    if len(tensors) == 1:
        return replace(first, shape=shape)
    if first.size % first.blocksize:
        allowed = f"must be a multiple of blocksize={first.blocksize}, or else blocks would straddle experts"
        raise ValueError(f"{name(0)}.shape={first.shape} has {first.size} numbers: {allowed}")
    joined = replace(
        first,
        packed=torch.cat([tensor.packed for tensor in tensors]),
        absmax=torch.cat([tensor.absmax for tensor in tensors]),
        shape=shape,
    )
    if first.nested_absmax is None:
        return joined
    return replace(
        joined,
        nested_absmax=torch.cat([tensor.arrays()["nested_absmax"] for tensor in tensors]),
        nested_offset=torch.stack([tensor.arrays()["nested_offset"].reshape(()) for tensor in tensors]),
    )


def check_same(name: str, tensor: NF4Tensor, first_name: str, first: NF4Tensor, fields: Iterable[str]) -> None:
    """Checks that two tensors agree in some of their fields.

    Raises:
        ValueError: one line naming the field, its value, and the value of the first.
    """
    for field in fields:
        ours, others = getattr(tensor, field), getattr(first, field)
        if ours != others:
            raise ValueError(f"{name}.{field}={ours}: must be {others}, that of {first_name}")


def _check_alike(name: str, tensor: NF4Tensor, first_name: str, first: NF4Tensor) -> None:
    check_same(name, tensor, first_name, first, SAME)
    kinds = ["plain" if one.nested_absmax is None else "nested" for one in (tensor, first)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name} has {kinds[0]} statistics: must have {kinds[1]} ones, as {first_name} (or unnest)")
    codes: list[Any] = [tensor.nested_code, first.nested_code]
    if kinds[0] == "nested" and not same_bits(*codes):
        raise ValueError(f"{name}.nested_code differs: must be that of {first_name}, bit for bit (or unnest)")


def unnest(tensor: NF4Tensor) -> NF4Tensor:
    """Decodes nested absmax to plain fp32: the same numbers, bit for bit (Q3, Q5). The codes are not copied.

    Args:
        tensor: of any shape, with nested statistics in any number of segments. Plain statistics stay unchanged.

    Raises:
        ValueError, TypeError: one line naming the field, its value, and what is allowed.
    """
    check_tensor("tensor", tensor)
    nested_absmax, code, offset = (tensor.arrays().get(name) for name in NESTED)
    if nested_absmax is None or code is None or offset is None:
        return tensor
    segments = tensor.segments
    blocks = tensor.absmax.shape[0] // max(1, segments)
    nested_blocks = ceil(blocks / tensor.nested_blocksize)
    scales = nested_absmax.reshape(segments, nested_blocks).repeat_interleave(tensor.nested_blocksize, dim=1)
    codes = tensor.absmax.reshape(segments, blocks).int()
    products = code[codes] * scales[:, :blocks]  # rounded to fp32 here, and again in the sum
    absmax = products + offset.reshape(-1, 1)
    return replace(tensor, absmax=absmax.reshape(-1), nested_absmax=None, nested_code=None, nested_offset=None)


def check_tensor(name: str, tensor: Any) -> None:
    """Checks an `NF4Tensor`, and that torch holds its bytes.

    Raises:
        ValueError, TypeError: one line naming the field, its value, and what is allowed.
    """
    check_nf4(name, tensor)
    if not isinstance(tensor.packed, Tensor):
        kind = type(tensor.packed)
        raise TypeError(f"{name}.packed is a {kind.__module__}.{kind.__name__}: must be a torch.Tensor")
