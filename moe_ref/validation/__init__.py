"""Refuses bad input in one line: argument, value, what is allowed. The specification and every executor share it.

Nothing here reads an array's elements, so nothing here waits for a GPU.
"""

from __future__ import annotations

from moe_ref._typing import Array
from moe_ref.types import MoEConfig, MoEWeights
from moe_ref.validation.arrays import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_array,
    check_devices,
    check_shape,
    dtype_name,
)
from moe_ref.validation.config import check_config
from moe_ref.validation.mxfp4 import check_mxfp4, check_quantize_mxfp4
from moe_ref.validation.nf4 import DECODED_DTYPES, check_nf4, check_quantize
from moe_ref.validation.weights import (
    check_routed_weights,
    check_weights,
    checked_experts,
    checked_routing,
    dtype_hint,
)

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
    "check_routed_weights",
    "check_router_logits",
    "check_weights",
    "dtype_name",
]


def check_inputs(x: Array, router_logits: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``moe(x, router_logits, weights)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    experts, routing = checked_experts(weights), checked_routing(weights)
    _check_x(x, weights)
    if weights.config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, unless topk_ids are given")
    check_array("router_logits", router_logits, like=("x", x))
    expected = (*x.shape[:-1], weights.num_experts)
    check_shape("router_logits", router_logits, expected, "x's leading dimensions and E")
    check_devices({"x": x, **experts, "router_logits": router_logits, **routing})


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
    given = {"router_logits": router_logits}
    for name, value in (("selection_bias", selection_bias), ("expert_scale", expert_scale)):
        if value is not None:
            check_array(name, value, like=("router_logits", router_logits))
            check_shape(name, value, (router_logits.shape[-1],), "(E,)")
            given[name] = value
    check_devices(given)


def check_router_logits(router_logits: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``route(router_logits, weights)``.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    experts, routing = checked_experts(weights), checked_routing(weights)
    if weights.config.top_k is None:
        raise ValueError("top_k=None: must be an integer from 1 to E, to choose experts")
    check_array("router_logits", router_logits, like=("gate_up_proj", weights.gate_up_proj))
    if router_logits.ndim < 1 or router_logits.shape[-1] != weights.num_experts:
        allowed = f"(..., {weights.num_experts}), the last dimension E"
        raise ValueError(f"router_logits.shape={tuple(router_logits.shape)}: must be {allowed}")
    check_devices({"router_logits": router_logits, **experts, **routing})


def check_experts_inputs(x: Array, topk_ids: Array, topk_weights: Array, weights: MoEWeights) -> None:
    """Checks the arguments of ``routed_experts(x, topk_ids, topk_weights, weights)``; ids may have any value (R7).

    What only routing uses is not checked against the experts, which may be those of one rank (R8).

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    experts = checked_experts(weights)
    _check_x(x, weights)
    check_array("topk_ids", topk_ids, like=("x", x), dtypes=ID_DTYPES)
    check_array("topk_weights", topk_weights, like=("x", x))
    shape, leading = tuple(topk_ids.shape), tuple(x.shape[:-1])
    if len(shape) != len(leading) + 1 or shape[:-1] != leading or shape[-1] < 1:
        wanted = ", ".join([*map(str, leading), "K"])
        raise ValueError(f"topk_ids.shape={shape}: must be ({wanted}), x's leading dimensions and K of at least 1")
    check_shape("topk_weights", topk_weights, shape, "the shape of topk_ids")
    check_devices({"x": x, **experts, "topk_ids": topk_ids, "topk_weights": topk_weights})


def check_dy(x: Array, dy: Array) -> None:
    """Checks an upstream gradient.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    check_array("dy", dy, like=("x", x))
    check_shape("dy", dy, tuple(x.shape), "x's shape")
    check_devices({"x": x, "dy": dy})


def _check_x(x: Array, weights: MoEWeights) -> None:
    check_array("x", x, like=("gate_up_proj", weights.gate_up_proj))
    if x.ndim < 1 or x.shape[-1] != weights.hidden_size:
        allowed = f"(..., {weights.hidden_size}), the last dimension H of gate_up_proj"
        raise ValueError(f"x.shape={tuple(x.shape)}: must be {allowed}")
    wanted = dtype_name(weights.gate_up_proj)
    if dtype_name(x) != wanted:
        raise TypeError(f"x.dtype={dtype_name(x)}: must be {wanted}, gate_up_proj's{dtype_hint(x, weights)}")
