"""Puts 4-bit tensors into the place of a module's parameters: bitsandbytes' parametrization, or one for MXFP4.

Either decodes the whole stack when the attribute is read, so that other code keeps working. `executors.hf.parameters`
reads the bytes.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from executors import nf4
from executors._decode import decode_expert
from moe_ref.types import MXFP4Tensor, NF4Tensor


def check_library() -> None:
    """Raises ModuleNotFoundError where bitsandbytes is missing, whose parametrization holds the bytes."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "bitsandbytes is missing: must be there for 4-bit parameters (pip install moe-ref[qlora])"
        )


def put(module: nn.Module, name: str, tensor: NF4Tensor | MXFP4Tensor) -> None:
    """Replaces a parameter by a tensor in 4 bits, without a copy.

    Args:
        module: an experts module.
        name: of the parameter, which may be on the meta device.
        tensor: in NF4 or FP4, of the parameter's shape and not transposed; in MXFP4, as the layer reads it.
    """
    if isinstance(tensor, MXFP4Tensor):
        _put_mxfp4(module, name, tensor)
        return
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    entries = nf4.to_state_dict(tensor, name)
    device = tensor.packed.device
    setattr(module, name, nn.Parameter(entries.pop(name), requires_grad=False))
    replace_parameter_4bit_prequantized(module, name, _without(f"{name}.", entries), device)
    # The library reads no state dict.
    module.register_load_state_dict_pre_hook(partial(_from_state_dict, name=name))  # type: ignore[no-untyped-call]


class MXFP4Parametrization(nn.Module):
    """A parameter in MXFP4, whose blocks are the original; decodes the stack when the attribute is read.

    Attributes:
        scales: [E, rows, k / 32] uint8.
        dtype: the name of the dtype that it decodes to.
        stored_transposed: whether the class stores (E, k, rows).
    """

    scales: Tensor

    def __init__(self, scales: Tensor, dtype: str, stored_transposed: bool) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.dtype, self.stored_transposed = dtype, stored_transposed

    def tensor(self, blocks: Tensor) -> MXFP4Tensor:
        """[E, rows, k] as the layer reads it, in the same memory."""
        return MXFP4Tensor(blocks.detach(), self.scales, dtype=self.dtype)

    @torch.no_grad()
    def forward(self, blocks: Tensor) -> Tensor:
        """The stack in the class's own order."""
        tensor = self.tensor(blocks)
        stack = torch.stack([decode_expert(tensor, expert) for expert in range(tensor.shape[0])])
        return stack.transpose(1, 2) if self.stored_transposed else stack


def _put_mxfp4(module: Any, name: str, tensor: MXFP4Tensor) -> None:
    own = MXFP4Parametrization(tensor.scales, tensor.dtype, bool(module.is_transposed))
    setattr(module, name, nn.Parameter(tensor.blocks, requires_grad=False))
    parametrize.register_parametrization(module, name, own, unsafe=True)
    module.register_state_dict_post_hook(partial(_as_in_checkpoints, name=name))
    module.register_load_state_dict_pre_hook(partial(_from_checkpoints, name=name))


def _as_in_checkpoints(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, *, name: str) -> None:
    """The keys of gpt-oss' checkpoints: NAME_blocks and NAME_scales."""
    for own, key in _keys_of_mxfp4(prefix, name):
        if own in state:
            state[key] = state.pop(own)


def _from_checkpoints(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any, name: str) -> None:
    """Reads the keys that `_as_in_checkpoints` writes."""
    for own, key in _keys_of_mxfp4(prefix, name):
        if key in state:
            state[own] = state.pop(key)


def _keys_of_mxfp4(prefix: str, name: str) -> list[tuple[str, str]]:
    """Torch's key, and that of a checkpoint."""
    parts = (("original", "blocks"), ("0.scales", "scales"))
    return [(f"{prefix}parametrizations.{name}.{key}", f"{prefix}{name}_{part}") for key, part in parts]


def _from_state_dict(
    module: Any,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
    *,
    name: str,
) -> None:
    """Reads the entries that bitsandbytes' parametrization writes: torch copies the codes, and the state is new."""
    from bitsandbytes.functional import QuantState

    key = f"{prefix}{name}"
    if key not in state:
        return
    own = next(each for each in module.parametrizations[name] if hasattr(each, "quant_state"))
    entries = {other: value for other, value in state.items() if other == key or other.startswith(f"{key}.")}
    try:
        tensor = nf4.from_state_dict(entries, key)
        if tensor.shape != tuple(own.quant_state.shape):
            raise ValueError(f"size mismatch for {key}: shape={tensor.shape}: must be {tuple(own.quant_state.shape)}")
    except (ValueError, TypeError) as error:
        errors.append(str(error))
        return
    codes = module.parametrizations[name].original
    before, assign = own.quant_state.dtype, metadata.get("assign_to_params_buffers", False)
    arrays = _without(f"{key}.", {other: value.clone() for other, value in entries.items() if other != key})
    own.quant_state = QuantState.from_dict(arrays, device=entries[key].device if assign else codes.device)
    if not assign:  # as of torch's own parameters, the dtype is the module's
        own.quant_state.dtype = before
    for other in entries:
        del state[other]
    state[f"{prefix}parametrizations.{name}.original"] = tensor.packed[:, None]


def _without(prefix: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in entries.items()}
