"""Adapters of experts as `ExpertLoRA`: read out of PEFT's wrappers, and gate and up of their own made into one.

PEFT keeps an adapter of a stack as two matrices: A is (E*r, in) with the expert slowest, B is (out, r*E) with the
expert fastest. Both are viewed here, and no product of theirs is formed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from executors._protocol import Unsupported
from moe_ref.types import ExpertLoRA
from moe_ref.validation.arrays import check_array, check_finite

PREFIX = "moe_"  # of the names under which transformers has executors
UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"


class Factors(NamedTuple):
    """An adapter of one projection: the result gains ``scaling * (row A^T) B^T``.

    Attributes:
        a: [E, r, in].
        b: [E, out, r].
        scaling: a number.
    """

    a: Tensor
    b: Tensor
    scaling: float


def lora_of(wrappers: Iterable[Any]) -> ExpertLoRA | None:
    """What PEFT's wrappers of one experts module add to it now; None where no adapter of theirs is active.

    Several active adapters of a projection are one of the sum of their ranks, whose B has their scalings in it.

    Args:
        wrappers: ``peft.tuners.lora.ParamWrapper``, at most one for each projection.

    Raises:
        Unsupported: an adapter does more than add ``scaling * B A`` to a projection.
    """
    found: dict[str, Any] = {}
    for wrapper in wrappers:
        own = [factors_of(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]
        if own:
            prefix = "down" if wrapper.parameter_name == DOWN else "gate_up"
            a, b, scaling = own[0] if len(own) == 1 else _concatenated(own)
            found |= {f"{prefix}_lora_a": a, f"{prefix}_lora_b": b, f"{prefix}_scaling": scaling}
    return ExpertLoRA(**found) if found else None


def factors_of(wrapper: Any, adapter: str) -> Factors:
    """One adapter of a wrapper, as views of its parameters.

    Raises:
        Unsupported: as `lora_of`.
    """
    check_wrapper(wrapper, adapter)
    experts = wrapper.num_experts
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return Factors(a, b, wrapper.scaling[adapter])


def check_wrapper(wrapper: Any, adapter: str) -> None:
    """Refuses an adapter that is none of `Factors`.

    Raises:
        Unsupported: as `lora_of`.
    """
    name, module = wrapper.parameter_name, wrapper.get_base_layer()
    if name not in (*UP, DOWN):
        raise Unsupported(f"target_parameters has {name!r}: must be of {', '.join((*UP, DOWN))}: no other has adapters")
    more = {
        "use_dora": wrapper.use_dora.get(adapter, False),
        "lora_bias": wrapper.lora_bias.get(adapter, False),
        "lora_dropout": not isinstance(wrapper.lora_dropout[adapter], nn.Identity),
        "a LoRA variant": adapter in wrapper.lora_variant,
    }
    for option, given in more.items():
        if given:
            raise Unsupported(f"adapter {adapter!r} of {name} has {option}: must not for experts on an executor")
    if getattr(wrapper, "_did_swap_in_out_features", False) == module.is_transposed:
        raise Unsupported(
            f"adapter {adapter!r} of {name} has in and out exchanged: must be made by a PEFT that knows is_transposed"
        )


def _concatenated(several: list[Factors]) -> Factors:
    a = torch.cat([one.a for one in several], 1)
    b = torch.cat([one.b * one.scaling for one in several], 2)
    return Factors(a, b, 1.0)


def join_gate_and_up(
    gate_a: Tensor,
    gate_b: Tensor,
    up_a: Tensor,
    up_b: Tensor,
    *,
    layout: Literal["concatenated", "interleaved"],
    gate_scaling: float = 1.0,
    up_scaling: float = 1.0,
) -> ExpertLoRA:
    """Adapters of gate and up, each with an A of its own, as one adapter of gate_up_proj: exactly, of rank r + q.

    A is both, one below the other. B is block-diagonal: gate rows have zeros where up's ranks are, and up rows the
    other way round. Scalings that differ go into B. Add ``down_lora_a``, ``down_lora_b`` and ``down_scaling`` by
    `dataclasses.replace`.

    Args:
        gate_a: [E, r, H].
        gate_b: [E, I, r].
        up_a: [E, q, H].
        up_b: [E, I, q].
        layout: of gate_up_proj's rows, as ``MoEConfig.gate_up_layout``.
        gate_scaling: multiplies what is added to gate.
        up_scaling: multiplies what is added to up.

    Returns:
        ExpertLoRA with gate_up_lora_a [E, r + q, H] and gate_up_lora_b [E, 2I, r + q], differentiable in all four.

    Raises:
        ValueError: shapes do not fit, a scaling is not finite, or there is no such layout.
        TypeError: a factor is no array of floats, or a scaling no number.
    """
    _check_pair("gate", gate_a, gate_b, gate_scaling)
    _check_pair("up", up_a, up_b, up_scaling)
    for name, one, other in (("up_a", up_a, gate_a), ("up_b", up_b, gate_b)):
        axis = 2 if name == "up_a" else 1
        if (one.shape[0], one.shape[axis]) != (other.shape[0], other.shape[axis]):
            raise ValueError(f"{name}.shape={tuple(one.shape)}: must fit gate's {tuple(other.shape)} but for the rank")
    if layout not in ("concatenated", "interleaved"):
        raise ValueError(f"layout={layout!r}: must be 'concatenated' or 'interleaved'")
    scaling = gate_scaling if gate_scaling == up_scaling else 1.0
    if gate_scaling != up_scaling:
        gate_b, up_b = gate_b * gate_scaling, up_b * up_scaling
    rows = (
        torch.cat([gate_b, gate_b.new_zeros(*gate_b.shape[:2], up_b.shape[2])], 2),
        torch.cat([up_b.new_zeros(*up_b.shape[:2], gate_b.shape[2]), up_b], 2),
    )
    b = torch.cat(rows, 1) if layout == "concatenated" else torch.stack(rows, 2).flatten(1, 2)
    return ExpertLoRA(gate_up_lora_a=torch.cat([gate_a, up_a], 1), gate_up_lora_b=b, gate_up_scaling=scaling)


def split_gate_and_up(b: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """[E, I, r] B of gate and B of up, as views of b [E, 2I, r]: their A is the same."""
    if layout == "interleaved":
        return b[:, 0::2], b[:, 1::2]
    gate, up = b.chunk(2, 1)
    return gate, up


def _check_pair(name: str, a: Tensor, b: Tensor, scaling: float) -> None:
    for end, factor in (("a", a), ("b", b)):
        check_array(f"{name}_{end}", factor)
    check_finite(f"{name}_scaling", scaling)
    if a.ndim != 3 or b.ndim != 3 or (a.shape[0], a.shape[1]) != (b.shape[0], b.shape[2]):
        raise ValueError(
            f"{name}_a.shape={tuple(a.shape)}, {name}_b.shape={tuple(b.shape)}: must be (E, r, H) and (E, I, r)"
        )
