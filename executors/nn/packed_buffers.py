"""Projections in 4 bits as buffers of a module: how they are held, written to a state dict, and read from one.

The arrays of `PackedTensor` are buffers of the module, named after the projection: ``gate_up_proj_packed``,
``down_proj_scales``. Those of MXFP4 have the names of gpt-oss' checkpoints and are saved as they are. Those of NF4 and
FP4 are saved under bitsandbytes' keys instead (`executors.nf4.to_state_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from executors.nf4 import from_state_dict, to_state_dict
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor
from moe_ref.validation import FLOAT_DTYPES, dtype_name

Form = tuple[type[PackedTensor], dict[str, Any]]  # the class, and its fields that are no arrays


def hold(module: nn.Module, name: str, tensor: PackedTensor) -> Form:
    """Makes buffers of a tensor's arrays, in place of those that were there, and returns its form."""
    for part in type(tensor).NAMES:
        if f"{name}_{part}" in module._buffers:
            delattr(module, f"{name}_{part}")
    for part, array in tensor.arrays().items():
        module.register_buffer(f"{name}_{part}", array, persistent=isinstance(tensor, MXFP4Tensor))
    own = type(tensor)
    return own, {f.name: getattr(tensor, f.name) for f in fields(own) if f.name not in own.NAMES}  # type: ignore[arg-type]


def not_held(key: str, entry: Any, buffer: Tensor) -> str:
    """Why an entry of a state dict must not be copied into a buffer, which would cast it; "" where it may.

    Bytes are bytes. A selection bias may be widened: rounded, it chooses other experts (R3).
    """
    if not isinstance(entry, Tensor) or entry.dtype == buffer.dtype:
        return ""
    floats = all(dtype_name(value) in FLOAT_DTYPES for value in (entry, buffer))
    if floats and torch.promote_types(entry.dtype, buffer.dtype) == buffer.dtype:
        return ""
    exactly = ", or hold it exactly, since it chooses experts (R3)" if buffer.is_floating_point() else ""
    return f"{key}.dtype={dtype_name(entry)}: must be {dtype_name(buffer)}{exactly}"


def held(module: nn.Module, name: str, form: Form) -> PackedTensor:
    """The tensor of these buffers: a thin view, made anew at each call."""
    own, static = form
    arrays = {part: getattr(module, f"{name}_{part}") for part in own.NAMES if f"{name}_{part}" in module._buffers}
    return own(**arrays, **static)


def saved(tensor: NF4Tensor, key: str) -> dict[str, Tensor]:
    """Its entries of a state dict; on the device "meta", which has no numbers, with an offset of 0."""
    if tensor.device.type != "meta":
        return to_state_dict(tensor, key)
    shown = tensor.map(lambda array: torch.zeros_like(array, device="cpu"))
    return {name: value.to("meta") for name, value in to_state_dict(shown, key).items()}


def entries(tensor: NF4Tensor) -> SimpleNamespace:
    """Those entries as attributes: ``torch.distributed.checkpoint`` follows the dots of a key from object to object."""
    root = SimpleNamespace()
    for path, value in saved(tensor, "").items():
        *objects, last = path.split(".")[1:] or ["packed"]
        place = root
        for name in objects:
            place = vars(place).setdefault(name, SimpleNamespace())
        setattr(place, last, value)
    return root


def loaded(state: Mapping[str, Tensor], key: str, before: NF4Tensor, *, assign: bool) -> NF4Tensor:
    """The tensor that a state dict has under a key, for a module that held ``before``.

    The form of the entries counts: blocksize, nested or not. The order of storage is the module's, since the entries do
    not tell it. As of torch's own parameters, the device and the dtype that is decoded to are the module's, or with
    ``assign`` those of the entries.

    Raises:
        ValueError, TypeError: the entries do not make such a tensor, or there is nowhere to copy them to.
    """
    if before.device.type == "meta" and not assign:
        raise ValueError(f"{key} is on the device meta: must be loaded with assign=True, or after to_empty(device=...)")
    tensor = from_state_dict(state, key, transposed=before.transposed)
    if tensor.shape != before.shape:
        raise ValueError(f"size mismatch for {key}: shape={tensor.shape}: must be {before.shape}, the module's")
    if assign:
        return tensor
    there = tensor.to(before.device, dtype=before.dtype)
    if _form(there) != _form(before):  # other buffers: who shares those that were there reads them in their form
        return there.map(torch.clone)
    old = before.arrays()
    for name, array in there.arrays().items():
        old[name].copy_(array)
    return replace(there, **old)


def _form(tensor: NF4Tensor) -> tuple[Any, ...]:
    arrays = {name: (array.shape, array.dtype) for name, array in tensor.arrays().items()}
    return tensor.quant_type, tensor.blocksize, tensor.nested_blocksize, arrays
