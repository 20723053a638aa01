"""Refuses bad input in one line: argument, value, what is allowed. The specification and every executor share it.

Nothing here reads an array's elements, so nothing here waits for a GPU.
"""

from __future__ import annotations

from typing import get_args

from moe_ref._typing import Array
from moe_ref.types import (
    Activation,
    ExpertLoRA,
    MoEConfig,
    MoEWeights,
    MXFP4Tensor,
)
from moe_ref.validation.arrays import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_array,
    check_choice,
    check_finite,
    check_shape,
    dtype_name,
    short,
)
from moe_ref.validation.config import check_config
from moe_ref.validation.mxfp4 import check_mxfp4, check_quantize_mxfp4
from moe_ref.validation.nf4 import DECODED_DTYPES, check_nf4, check_quantize

__all__ = [
    "DECODED_DTYPES",
    "FLOAT_DTYPES",
    "check_config",
    "check_dy",
    "check_experts_inputs",
    "check_inputs",
    "check_mxfp4",
    "check_nf4",
    "check_quantize",
    "check_quantize_mxfp4",
    "check_route_inputs",
    "check_router_logits",
    "check_weights",
    "dtype_name",
]


def check_weights(weights: MoEWeights) -> None:
    """Checks the shapes, dtypes and devices of a layer's parameters, and its configuration.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights={short(weights)}: must be a moe_ref.MoEWeights")
    if not isinstance(weights.config, MoEConfig):
        raise TypeError(f"config={short(weights.config)}: must be a moe_ref.MoEConfig")
    check_choice("activation", weights.config.activation, get_args(Activation))
    gate_up, down = weights.gate_up_proj, weights.down_proj
    for name, projection in weights.packed().items():
        check_mxfp4(name, projection) if isinstance(projection, MXFP4Tensor) else check_nf4(name, projection)
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
        raise TypeError(f"down_proj.dtype={dtype_name(down)}: must be {dtype_name(gate_up)}, gate_up_proj's")
    optional = (
        ("gate_up_proj_bias", (experts, both), "(E, 2*I)" if gated else "(E, I)"),
        ("down_proj_bias", (experts, hidden), "(E, H)"),
        ("selection_bias", (experts,), "(E,)"),
        ("expert_scale", (experts,), "(E,)"),
        ("post_expert_norm", (hidden,), "(H,)"),
    )
    for name, expected, letters in optional:
        value = getattr(weights, name)
        if value is not None:
            check_array(name, value, like=("gate_up_proj", gate_up))
            check_shape(name, value, expected, letters)
    if weights.lora is not None:
        _check_lora(weights.lora, gate_up, inner)
    check_config(weights.config, experts)


def _order_hint(gate_up: tuple[int, ...], down: tuple[int, ...], gated: bool) -> str:
    """Which projections would fit with their last two dimensions swapped, if any."""
    if len(down) != 3:
        return ""
    parts = 2 if gated else 1
    for names in (("down_proj",), ("gate_up_proj",), ("gate_up_proj", "down_proj")):
        experts, both, hidden = _swapped(gate_up) if "gate_up_proj" in names else gate_up
        other = _swapped(down) if "down_proj" in names else down
        if other[:2] == (experts, hidden) and parts * other[2] == both:
            return f"; stored in the other order? pass {' and '.join(f'{name}.transpose(1, 2)' for name in names)}"
    return ""


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[2], shape[1]


def _check_lora(lora: ExpertLoRA, gate_up: Array, inner: int) -> None:
    if not isinstance(lora, ExpertLoRA):
        raise TypeError(f"lora={short(lora)}: must be a moe_ref.ExpertLoRA or None")
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


def check_inputs(x: Array, router_logits: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``moe(x, router_logits, weights)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_weights(weights)
    _check_x(x, weights)
    if weights.config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, unless topk_ids are given")
    check_array("router_logits", router_logits, like=("x", x))
    expected = (*x.shape[:-1], weights.num_experts)
    check_shape("router_logits", router_logits, expected, "x's leading dimensions and E")


def check_route_inputs(
    router_logits: Array, config: MoEConfig, selection_bias: Array | None, expert_scale: Array | None = None
) -> None:
    """Checks the arguments of ``moe_ref.route(router_logits, config, selection_bias, expert_scale=expert_scale)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_array("router_logits", router_logits)
    if router_logits.ndim < 2 or router_logits.shape[-1] < 1:
        raise ValueError(f"router_logits.shape={tuple(router_logits.shape)}: must be (T, E), E at least 1")
    check_config(config, router_logits.shape[-1])
    if config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, to choose experts")
    for name, value in (("selection_bias", selection_bias), ("expert_scale", expert_scale)):
        if value is not None:
            check_array(name, value, like=("router_logits", router_logits))
            check_shape(name, value, (router_logits.shape[-1],), "(E,)")


def check_router_logits(router_logits: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``route(router_logits, weights)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_weights(weights)
    if weights.config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, to choose experts")
    check_array("router_logits", router_logits, like=("gate_up_proj", weights.gate_up_proj))
    if router_logits.ndim < 1 or router_logits.shape[-1] != weights.num_experts:
        allowed = f"(..., {weights.num_experts}), the last dimension E"
        raise ValueError(f"router_logits.shape={tuple(router_logits.shape)}: must be {allowed}")


def check_experts_inputs(x: Array, topk_ids: Array, topk_weights: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``routed_experts(x, topk_ids, topk_weights, weights)``; ids may have any value (R7).

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_weights(weights)
    _check_x(x, weights)
    check_array("topk_ids", topk_ids, like=("x", x), dtypes=ID_DTYPES)
    check_array("topk_weights", topk_weights, like=("x", x))
    shape, leading = tuple(topk_ids.shape), tuple(x.shape[:-1])
    if len(shape) != len(leading) + 1 or shape[:-1] != leading or shape[-1] < 1:
        wanted = ", ".join([*map(str, leading), "K"])
        raise ValueError(f"topk_ids.shape={shape}: must be ({wanted}), x's leading dimensions and K of at least 1")
    check_shape("topk_weights", topk_weights, shape, "the shape of topk_ids")


def check_dy(x: Array, dy: Array) -> None:
    """Checks an upstream gradient.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_array("dy", dy, like=("x", x))
    check_shape("dy", dy, tuple(x.shape), "x's shape")


def _check_x(x: Array, weights: MoEWeights) -> None:
    check_array("x", x, like=("gate_up_proj", weights.gate_up_proj))
    if x.ndim < 1 or x.shape[-1] != weights.hidden_size:
        allowed = f"(..., {weights.hidden_size}), the last dimension H of gate_up_proj"
        raise ValueError(f"x.shape={tuple(x.shape)}: must be {allowed}")
    if dtype_name(x) != dtype_name(weights.gate_up_proj):
        raise TypeError(f"x.dtype={dtype_name(x)}: must be {dtype_name(weights.gate_up_proj)}, gate_up_proj's")
