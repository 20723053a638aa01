"""Bad input, told in one line: argument, value, what is allowed. The specification and every executor share it.

Nothing here reads an array's elements, so nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, get_args

import numpy as np

from moe_ref._typing import Array
from moe_ref.types import Activation, GateUpLayout, MoEConfig, MoEWeights, Scoring

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
ID_DTYPES = ("int32", "int64")


def dtype_name(array: Array) -> str:
    """The dtype's name without its library: "bfloat16" for torch.bfloat16."""
    return str(array.dtype).rpartition(".")[2]


def check_config(config: MoEConfig, num_experts: int | None = None) -> None:
    """Checks a configuration, and ``top_k`` against E where E is known (R8).

    Raises:
        ValueError, TypeError: one line naming the field, its value, and what is allowed.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config={_short(config)}: must be a moe_ref.MoEConfig")
    top_k = config.top_k
    if top_k is not None:
        _check_integer("top_k", top_k)
        if top_k < 1 or (num_experts is not None and top_k > num_experts):
            most = "" if num_experts is None else f" and at most {num_experts} (E)"
            raise ValueError(f"top_k={top_k}: must be at least 1{most}")
    _check_choice("scoring", config.scoring, get_args(Scoring))
    _check_choice("activation", config.activation, get_args(Activation))
    _check_choice("gate_up_layout", config.gate_up_layout, get_args(GateUpLayout))
    if not isinstance(config.renormalize, bool):
        raise TypeError(f"renormalize={_short(config.renormalize)}: must be True or False")
    for name in ("renormalize_eps", "routed_scaling_factor", "alpha", "up_offset"):
        _check_finite(name, getattr(config, name))
    if config.renormalize_eps < 0:
        raise ValueError(f"renormalize_eps={config.renormalize_eps}: must be at least 0")
    if config.limit is not None:
        _check_finite("limit", config.limit)
        if config.limit <= 0:
            raise ValueError(f"limit={config.limit}: must be positive, or None for no clamp")


def check_weights(weights: MoEWeights) -> None:
    """Checks shapes, dtypes and devices of a layer's parameters, and its configuration.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights={_short(weights)}: must be a moe_ref.MoEWeights")
    gate_up, down = weights.gate_up_proj, weights.down_proj
    _check_array("gate_up_proj", gate_up)
    _check_array("down_proj", down, like=("gate_up_proj", gate_up))
    shape = tuple(gate_up.shape)
    if len(shape) != 3 or min(shape) < 1 or shape[1] % 2:
        raise ValueError(f"gate_up_proj.shape={shape}: must be (E, 2*I, H), each at least 1")
    experts, both, hidden = shape
    _check_shape("down_proj", down, (experts, hidden, both // 2), "(E, H, I) to match gate_up_proj (E, 2*I, H)")
    if dtype_name(down) != dtype_name(gate_up):
        raise TypeError(f"down_proj.dtype={dtype_name(down)}: must be {dtype_name(gate_up)}, gate_up_proj's")
    for name, size, letters in (("gate_up_proj_bias", both, "(E, 2*I)"), ("down_proj_bias", hidden, "(E, H)")):
        bias = getattr(weights, name)
        if bias is not None:
            _check_array(name, bias, like=("gate_up_proj", gate_up))
            _check_shape(name, bias, (experts, size), letters)
    check_config(weights.config, experts)


def check_inputs(x: Array, router_logits: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``moe(x, router_logits, weights)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_weights(weights)
    _check_x(x, weights)
    if weights.config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, unless topk_ids are given")
    _check_array("router_logits", router_logits, like=("x", x))
    expected = (*x.shape[:-1], weights.num_experts)
    _check_shape("router_logits", router_logits, expected, "x's leading dimensions and E")


def check_route_inputs(router_logits: Array, config: MoEConfig) -> None:
    """Checks the arguments of ``moe_ref.route(router_logits, config)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    _check_array("router_logits", router_logits)
    if router_logits.ndim < 2 or router_logits.shape[-1] < 1:
        raise ValueError(f"router_logits.shape={tuple(router_logits.shape)}: must be (T, E), E at least 1")
    check_config(config, router_logits.shape[-1])
    if config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, to choose experts")


def check_router_logits(router_logits: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``route(router_logits, weights)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_weights(weights)
    if weights.config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, to choose experts")
    _check_array("router_logits", router_logits, like=("gate_up_proj", weights.gate_up_proj))
    if router_logits.ndim < 1 or router_logits.shape[-1] != weights.num_experts:
        allowed = f"(..., {weights.num_experts}), the last dimension E"
        raise ValueError(f"router_logits.shape={tuple(router_logits.shape)}: must be {allowed}")


def check_experts_inputs(x: Array, topk_ids: Array, topk_weights: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``routed_experts(x, topk_ids, topk_weights, weights)``; ids themselves are free (R7).

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_weights(weights)
    _check_x(x, weights)
    _check_array("topk_ids", topk_ids, like=("x", x), dtypes=ID_DTYPES)
    _check_array("topk_weights", topk_weights, like=("x", x))
    shape, leading = tuple(topk_ids.shape), tuple(x.shape[:-1])
    if len(shape) != len(leading) + 1 or shape[:-1] != leading or shape[-1] < 1:
        wanted = ", ".join([*map(str, leading), "K"])
        raise ValueError(f"topk_ids.shape={shape}: must be ({wanted}), x's leading dimensions and K of at least 1")
    _check_shape("topk_weights", topk_weights, shape, "the shape of topk_ids")


def check_dy(x: Array, dy: Array) -> None:
    """Checks an upstream gradient.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    _check_array("dy", dy, like=("x", x))
    _check_shape("dy", dy, tuple(x.shape), "x's shape")


def _check_x(x: Array, weights: MoEWeights) -> None:
    _check_array("x", x, like=("gate_up_proj", weights.gate_up_proj))
    if x.ndim < 1 or x.shape[-1] != weights.hidden_size:
        allowed = f"(..., {weights.hidden_size}), the last dimension H of gate_up_proj (E, 2*I, H)"
        raise ValueError(f"x.shape={tuple(x.shape)}: must be {allowed}")
    if dtype_name(x) != dtype_name(weights.gate_up_proj):
        raise TypeError(f"x.dtype={dtype_name(x)}: must be {dtype_name(weights.gate_up_proj)}, gate_up_proj's")


def _check_array(
    name: str, value: Any, like: tuple[str, Array] | None = None, dtypes: tuple[str, ...] = FLOAT_DTYPES
) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name}={_short(value)}: must be an array")
    if dtype_name(value) not in dtypes:
        raise TypeError(f"{name}.dtype={dtype_name(value)}: must be one of {', '.join(dtypes)}")
    if like is None:
        return
    other_name, other = like
    if _library(value) != _library(other):
        raise TypeError(f"{name} is a {_library(value)} array: must be a {_library(other)} array, as {other_name}")
    if _device(value) != _device(other):
        raise ValueError(f"{name}.device={_device(value)}: must be {_device(other)}, {other_name}'s")


def _check_shape(name: str, value: Array, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}.shape={tuple(value.shape)}: must be {tuple(expected)}, {meaning}")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={_short(value)}: must be an integer")


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}={_short(value)}: must be a float or int")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value}: must be finite")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={_short(value)}: must be one of {', '.join(map(repr, allowed))}")


def _library(value: Array) -> str:
    """The library at the root of the array's class: a subclass of torch.Tensor is a torch array."""
    return [c.__module__.partition(".")[0] for c in type(value).__mro__ if c.__module__ != "builtins"][-1]


def _device(value: Array) -> Any:
    return getattr(value, "device", "cpu")


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
