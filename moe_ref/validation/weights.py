"""Checks a layer's parameters. An error is one line: argument, value, what is allowed.

What the experts use and what only routing uses are checked apart: where routing was done elsewhere, a configuration, a
selection bias and learned scales may be those of the whole model, and the experts those of one rank (R8).
"""

from __future__ import annotations

from typing import Any, get_args

from moe_ref._typing import Array
from moe_ref.types import DENSE, Activation, ExpertLoRA, MoEConfig, MoEWeights, MXFP4Tensor, PackedTensor
from moe_ref.validation.arrays import (
    check_array,
    check_choice,
    check_devices,
    check_finite,
    check_shape,
    dtype_name,
    short,
)
from moe_ref.validation.config import check_config, check_sizes
from moe_ref.validation.mxfp4 import check_mxfp4_form
from moe_ref.validation.nf4 import DECODED_DTYPES, check_nf4_form

OF_ROUTING = ("selection_bias", "expert_scale")


def check_weights(weights: MoEWeights) -> None:
    """Checks what a layer's experts use: shapes, dtypes and devices; and the configuration by itself.

    What only routing uses is not checked against the experts (R8).

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_devices(checked_experts(weights))


def check_routed_weights(weights: MoEWeights) -> None:
    """Checks a layer that chooses experts itself: as `check_weights`, and what routing uses against its experts (R8).

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_devices(checked_experts(weights) | checked_routing(weights))


def checked_experts(weights: MoEWeights) -> dict[str, Array]:
    """`check_weights` but for devices, which a call compares with those of its other arguments.

    Returns:
        The arrays that the experts use by argument, such as "down_proj" or, in 4 bits, "down_proj.packed".
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights={short(weights)}: must be a moe_ref.MoEWeights")
    if not isinstance(weights.config, MoEConfig):
        raise TypeError(f"config={short(weights.config)}: must be a moe_ref.MoEConfig")
    check_choice("activation", weights.config.activation, get_args(Activation))
    for name in DENSE:
        _check_no_list(name, getattr(weights, name))
    gate_up, down = weights.gate_up_proj, weights.down_proj
    for name, projection in weights.packed().items():
        check = check_mxfp4_form if isinstance(projection, MXFP4Tensor) else check_nf4_form
        check(name, projection)
    check_array("gate_up_proj", gate_up)
    check_array("down_proj", down, like=("gate_up_proj", gate_up))
    shape = tuple(gate_up.shape)
    gated = weights.config.gated
    form = "(E, 2*I, H)" if gated else "(E, I, H)"
    if len(shape) != 3 or min(shape) < 1 or (gated and shape[1] % 2):
        raise ValueError(f"gate_up_proj.shape={shape}: must be {form}, each at least 1")
    experts, both, hidden = shape
    inner = both // 2 if gated else both
    if tuple(down.shape) != (experts, hidden, inner):
        allowed = f"must be {(experts, hidden, inner)}, (E, H, I) to match gate_up_proj {form}"
        raise ValueError(
            f"down_proj.shape={tuple(down.shape)}: {allowed}{_order_hint(shape, tuple(down.shape), gated)}"
        )
    if dtype_name(down) != dtype_name(gate_up):
        allowed = f"must be {dtype_name(gate_up)}, gate_up_proj's{_decoding_hint(weights)}"
        raise TypeError(f"down_proj.dtype={dtype_name(down)}: {allowed}")
    found: dict[str, Array] = {}
    for name, projection in (("gate_up_proj", gate_up), ("down_proj", down)):
        if isinstance(projection, PackedTensor):
            found |= {f"{name}.{part}": array for part, array in projection.arrays().items()}
        else:
            found[name] = projection
    optional = (
        ("gate_up_proj_bias", (experts, both), "(E, 2*I)" if gated else "(E, I)"),
        ("down_proj_bias", (experts, hidden), "(E, H)"),
        ("post_expert_norm", (hidden,), "(H,)"),
    )
    for name, expected, letters in optional:
        value = getattr(weights, name)
        if value is not None:
            check_array(name, value, like=("gate_up_proj", gate_up))
            check_shape(name, value, expected, letters)
            found[name] = value
    for name in OF_ROUTING:
        value = getattr(weights, name)
        if value is not None:
            check_array(name, value)
    if weights.lora is not None:
        found |= _checked_lora(weights.lora, gate_up, inner)
    check_config(weights.config)
    return found


def checked_routing(weights: MoEWeights) -> dict[str, Array]:
    """What only routing uses, against the experts (R8), of a layer that `checked_experts` has passed; no devices.

    Returns:
        Its arrays by argument.
    """
    check_sizes(weights.config, weights.num_experts)
    found: dict[str, Array] = {}
    for name in OF_ROUTING:
        value = getattr(weights, name)
        if value is not None:
            check_array(name, value, like=("gate_up_proj", weights.gate_up_proj))
            check_shape(name, value, (weights.num_experts,), "(E,)")
            found[name] = value
    return found


def dtype_hint(x: Array, weights: MoEWeights) -> str:
    """What helps where x has another dtype than the projections."""
    wanted = dtype_name(weights.gate_up_proj)
    if weights.packed() and dtype_name(x) in DECODED_DTYPES:
        return f"; weights.to(dtype={dtype_name(x)!r}) makes 4 bits decode to x's"
    return f"; cast it with x.to(torch.{wanted}), also under autocast" if hasattr(x, "requires_grad") else ""


def _decoding_hint(weights: MoEWeights) -> str:
    """What helps where the two projections decode to different dtypes, or one is dense and has another."""
    packed = weights.packed()
    dense = [name for name in ("gate_up_proj", "down_proj") if name not in packed]
    dtype = dtype_name(getattr(weights, (dense or ["gate_up_proj"])[0]))
    return f"; weights.to(dtype={dtype!r}) makes 4 bits decode to it" if packed and dtype in DECODED_DTYPES else ""


def _check_no_list(name: str, value: Any) -> None:
    """Refuses matrices of experts one by one, and names what makes a stack of them."""
    if isinstance(value, (str, PackedTensor)) or hasattr(value, "shape"):  # a broken tensor may have no shape
        return
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return
    kind, count = type(value).__name__, len(value)
    raise TypeError(
        f"{name} is a {kind} of {count}: must be an array, which moe_ref.MoEWeights.stack makes of it, once"
    )


def _order_hint(gate_up: tuple[int, ...], down: tuple[int, ...], gated: bool) -> str:
    """Which projections would fit with their last two dimensions swapped, if any; or with an up projection beside."""
    if len(down) != 3:
        return ""
    parts = 2 if gated else 1
    for names in (("down_proj",), ("gate_up_proj",), ("gate_up_proj", "down_proj")):
        experts, both, hidden = _swapped(gate_up) if "gate_up_proj" in names else gate_up
        other = _swapped(down) if "down_proj" in names else down
        if other[:2] == (experts, hidden) and parts * other[2] == both:
            return f"; stored in the other order? pass {' and '.join(f'{name}.transpose(1, 2)' for name in names)}"
    experts, rows, hidden = gate_up
    if gated and down == (experts, hidden, rows):
        return "; gate and up stored apart? moe_ref.MoEWeights.stack fuses them, once; executors.nf4.fuse in 4 bits"
    return ""


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[2], shape[1]


def _checked_lora(lora: ExpertLoRA, gate_up: Array, inner: int) -> dict[str, Array]:
    if not isinstance(lora, ExpertLoRA):
        raise TypeError(f"lora={short(lora)}: must be a moe_ref.ExpertLoRA or None")
    found: dict[str, Array] = {}
    experts, both, hidden = gate_up.shape
    for projection, (out, width) in (("gate_up", (both, hidden)), ("down", (hidden, inner))):
        names = f"{projection}_lora_a", f"{projection}_lora_b"
        a, b = (getattr(lora, name) for name in names)
        if a is None and b is None:
            continue
        for name, other, factor in ((names[0], names[1], a), (names[1], names[0], b)):
            if factor is None:
                raise ValueError(f"{name}=None: must be given with {other}")
            check_array(name, factor, like=("gate_up_proj", gate_up))
        rank = a.shape[1] if a.ndim == 3 else 0
        if rank < 1 or tuple(a.shape) != (experts, rank, width):
            shape = tuple(a.shape)
            raise ValueError(f"{names[0]}.shape={shape}: must be ({experts}, rank, {width}), rank at least 1")
        check_shape(names[1], b, (experts, out, rank), f"the shape that goes with {names[0]}")
        check_finite(f"{projection}_scaling", getattr(lora, f"{projection}_scaling"))
        found |= {names[0]: a, names[1]: b}
    return found
