"""A module's projections: dense parameters as they are, and bitsandbytes' 4-bit parametrizations without decoding.

``bitsandbytes.nn.parametrize`` makes an attribute of a projection that decodes the whole stack whenever it is read. So
nothing here reads it: the bytes are ``module.parametrizations[name].original``, and their ``QuantState`` belongs to the
parametrization beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from executors._protocol import Unsupported
from executors.nf4.convert import from_quant_state, view_of_state
from moe_ref.types import NF4Tensor

FORMED = ("_LoraFactorsProxy", "_LoraParameterProxy")  # PEFT's, which add B A to a parameter while they are there
CHECKED = "_moe_ref_checked"  # of a parametrization: the state that was checked, once


def class_name(module: nn.Module) -> str:
    """The name of the module's class: bitsandbytes' parametrization puts another class in front of it."""
    return str(type_before_parametrizations(module).__name__)


def up_name(module: Any) -> str:
    """The name of the module's first projection."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def projection_of(module: Any, name: str) -> Tensor | NF4Tensor:
    """A projection as the module reads it: (E, H, 2I) is transposed where the class stores it so. Nothing is copied.

    Args:
        module: an experts module.
        name: "gate_up_proj", "up_proj" or "down_proj".

    Raises:
        Unsupported: it is in 4 bits and is parametrized by something else too; or PEFT has formed W + B A for this
            call, as its wrapper was made after the model was put on an executor.
        ValueError, TypeError: its bytes or its statistics are not what bitsandbytes makes.
    """
    found = packed_of(module, name)
    value = getattr(module, name) if found is None else found
    return value.transpose(1, 2) if module.is_transposed else value


def packed_of(module: Any, name: str) -> NF4Tensor | None:
    """[E, ...] The stored stack, where bitsandbytes parametrizes it; None where it is an ordinary attribute."""
    own = parametrization_of(module, name)
    if own is None:
        return None
    packed, state = module.parametrizations[name].original, own.quant_state
    if getattr(own, CHECKED, None) is not state:
        _check(own, packed, state)
    tensor = view_of_state(packed, state)
    if tensor.absmax.device == packed.device:
        return tensor
    return tensor.map(lambda array: array.to(packed.device))  # module.to() moves the bytes alone


def parametrization_of(module: nn.Module, name: str) -> Any | None:
    """bitsandbytes' parametrization of a parameter, or None.

    Raises:
        Unsupported: there is another beside it, or one that is PEFT's.
    """
    if "parametrizations" not in module._modules or name not in module.parametrizations:  # type: ignore[operator]
        return None
    chain = list(module.parametrizations[name])  # type: ignore[index]
    if any(type(each).__name__ in FORMED for each in chain):
        raise Unsupported(
            f"{class_name(module)}: {name} has an adapter that PEFT forms into W + B A: must run apart: call "
            "executors.hf.use(model) after the adapter was made, or make it within executors.hf.peft(model)"
        )
    own = [each for each in chain if hasattr(each, "quant_state")]
    if own and len(chain) > 1:
        others = ", ".join(type(each).__name__ for each in chain if each is not own[0])
        raise Unsupported(f"{class_name(module)}: {name} is in 4 bits and is parametrized by {others} too: must not be")
    return own[0] if own else None


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="executors.hf checks 4-bit statistics before it is traced: call the model once before it is compiled or "
    "exported, or switch it by executors.hf.use(model)"
)
def _check(own: Any, packed: Tensor, state: Any) -> None:
    """Checks a state at its first use: later calls look at shapes and devices alone."""
    from_quant_state(packed, state)
    setattr(own, CHECKED, state)
