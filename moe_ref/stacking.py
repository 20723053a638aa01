"""Stacks of experts' matrices that are stored one by one, and gate and up rows that are stored apart."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from moe_ref._typing import Array, Float
from moe_ref.moving import dtype_name
from moe_ref.packed_types import PackedTensor

ELSEWHERE = "executors.nf4 has fuse, from_linears and from_state_dict, which join 4 bits"


def stacked(name: str, value: Any) -> Any:
    """A stack [E, ...] of a sequence of E arrays, in new memory; what is a stack already, also in 4 bits, stays it.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    if value is None or hasattr(value, "shape"):
        return value
    parts = _parts(name, value)
    return array_namespace(*parts).stack(parts, axis=0)


def fused(gate_name: str, gate: Any, up_name: str, up: Any, layout: str) -> Float[Array, "E J *width"]:
    """Rows [E, 2I, ...] of gates and ups [E, I, ...], each a stack or a sequence of E arrays, in new memory.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    gates, ups = _parts(gate_name, gate), _parts(up_name, up)
    if len(gates) != len(ups):
        raise ValueError(f"{up_name} has {len(ups)} experts: must have {len(gates)}, as {gate_name}")
    _check_like(f"{up_name}[0]", ups[0], f"{gate_name}[0]", gates[0])
    xp, pairs = array_namespace(gates[0], ups[0]), list(zip(gates, ups, strict=True))
    if layout == "interleaved":
        rows = [xp.stack(pair, axis=1) for pair in pairs]
    else:
        rows = [half for pair in pairs for half in pair]  # neighbours in the stack: one copy makes it
    inner, *width = gates[0].shape
    return xp.reshape(xp.concat(rows, axis=0), (len(gates), 2 * inner, *width))


def rows_of(whole: Any, gate: Any, up: Any, suffix: str, layout: str) -> Any:
    """gate_up rows of a layer, or their bias, from the whole or from its two halves; ``layout`` is "" without gates.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    names = [f"{name}_proj{suffix}" for name in ("gate_up", "gate", "up")]
    if gate is None and up is None:
        if whole is None and not suffix:
            raise ValueError("gate_up_proj=None: must be given, or gate_proj and up_proj")
        return stacked(names[0], whole)
    if whole is not None:
        raise ValueError(f"{names[0]} is given: must be None with {names[1] if up is None else names[2]}")
    if not layout:
        if gate is not None:
            raise ValueError(f"{names[1]} is given: must be None for an activation that is not gated")
        return stacked(names[2], up)
    if gate is None or up is None:
        missing, other = (names[1], names[2]) if gate is None else (names[2], names[1])
        raise ValueError(f"{missing}=None: must be given with {other}")
    return fused(names[1], gate, names[2], up, layout)


def _parts(name: str, value: Any) -> list[Array]:
    """The arrays of E experts, alike and dense."""
    if isinstance(value, PackedTensor):
        raise TypeError(f"{name} is in {value.quant_type}: must be dense; {ELSEWHERE}")
    if isinstance(value, str) or not hasattr(value, "__getitem__") or not hasattr(value, "__len__"):
        raise TypeError(f"{name}={value!r:.60}: must be an array, or a sequence of one for each expert")
    parts = [value[e] for e in range(len(value))]
    if not parts:
        raise ValueError(f"{name} is of 0 experts: must be of at least 1")
    for e, part in enumerate(parts):
        if isinstance(part, PackedTensor):
            raise TypeError(f"{name}[{e}] is in {part.quant_type}: must be dense; {ELSEWHERE}")
        if not hasattr(part, "shape") or not len(part.shape):
            raise TypeError(f"{name}[{e}]={part!r:.60}: must be an array of at least one dimension")
        _check_like(f"{name}[{e}]", part, f"{name}[0]", parts[0])
    return parts


def _check_like(name: str, part: Array, first_name: str, first: Array) -> None:
    if tuple(part.shape) != tuple(first.shape):
        raise ValueError(f"{name}.shape={tuple(part.shape)}: must be {tuple(first.shape)}, {first_name}'s")
    if dtype_name(part) != dtype_name(first):
        raise TypeError(f"{name}.dtype={dtype_name(part)}: must be {dtype_name(first)}, {first_name}'s")
    devices = [getattr(array, "device", "cpu") for array in (part, first)]
    if devices[0] != devices[1]:
        raise ValueError(f"{name}.device={devices[0]}: must be {devices[1]}, {first_name}'s")
