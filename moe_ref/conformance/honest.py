"""Right executors that round elsewhere or add in another order. The suite must accept all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear, relu, silu

from moe_ref.conformance.wrapped import Wrapped, experts
from moe_ref.layer import layer_vjp
from moe_ref.numerics import Nearest, Rounding
from moe_ref.packed import decode_expert
from moe_ref.types import PARAMETERS, MoEConfig, MoEGradients, MoEWeights
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Executor


def honest_variants(inner: Executor) -> dict[str, Wrapped]:
    """The honest variants by name, for the kinds of weights that the executor takes."""
    changes = [weight_before_down_projection, rounded_at_every_site]
    if "dense" in inner.capabilities.weights:
        changes += [fp32_throughout, features_reversed]
    return {change.__name__: Wrapped(change.__name__, inner, slots=change) for change in changes}


def fp32_throughout(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Rounds only the result: widens x and the projections first."""
    wide = torch.promote_types(x.dtype, torch.float32)
    widened = replace(weights, gate_up_proj=weights.gate_up_proj.to(wide), down_proj=weights.down_proj.to(wide))
    return experts(inner, x.to(wide), ids, w, widened).to(x.dtype)


def features_reversed(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Adds the products in the opposite order."""
    features = {"gate_up_proj": 2, "gate_up_lora_a": 2, "down_proj": 1, "down_proj_bias": 1, "down_lora_b": 1}
    parameters = weights.parameters()
    features["post_expert_norm"] = 0
    flipped = weights.with_parameters({n: parameters[n].flip(axis) for n, axis in features.items() if n in parameters})
    return experts(inner, x.flip(1), ids, w, flipped).flip(1)


def weight_before_down_projection(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A plain torch loop that rounds every step to x's dtype and puts the routing weight on h (on x, with C3).

    With a norm after each expert the weight comes after it (E8).
    """
    return loop(x, ids, w, weights)


def loop(
    x: Tensor,
    ids: Tensor,
    w: Tensor,
    weights: MoEWeights,
    act: Callable[[Tensor, MoEConfig], Tensor] | None = None,
    norm: Callable[[Tensor, Tensor, float], Tensor] | None = None,
) -> Tensor:
    """The layer in plain torch; ``act`` makes h [n, I] of z [n, J], ``norm`` makes o' [n, H] of o, gamma and eps."""
    act, norm = act or activated, norm or normalized
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    config, lora = weights.config, weights.lora
    gamma = None if weights.post_expert_norm is None else weights.post_expert_norm.to(wide)  # its gradient is one sum
    scalings = (1.0, 1.0) if lora is None else (lora.gate_up_scaling, lora.down_scaling)
    for e in range(weights.num_experts):
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        own = {name: value[e] for name, value in weights.parameters().items() if name in PARAMETERS}
        own |= {name: decode_expert(value, e).to(x.dtype) for name, value in weights.packed().items()}
        weight = w[tokens, slots, None].to(wide)
        rows = x[tokens] if not config.scale_input else (weight * x[tokens]).to(x.dtype)
        late = torch.ones_like(weight) if config.scale_input else weight
        after = late if gamma is None else torch.ones_like(weight)
        z = linear(rows, own["gate_up_proj"]).to(wide) + _adapted(rows, own, "gate_up", scalings[0])
        if "gate_up_proj_bias" in own:
            z = z + own["gate_up_proj_bias"].to(wide)
        h = (act(z.to(x.dtype).to(wide), config) * after).to(x.dtype)
        o = linear(h, own["down_proj"]).to(wide) + _adapted(h, own, "down", scalings[1])
        if "down_proj_bias" in own:
            o = o + after * own["down_proj_bias"].to(wide)
        if gamma is not None:
            o = late * norm(o.to(x.dtype).to(wide), gamma, config.post_expert_norm_eps).to(x.dtype)
        y = y.index_add(0, tokens, o)
    return y.to(x.dtype)


def _adapted(rows: Tensor, own: dict[str, Tensor], name: str, scaling: float) -> Tensor | float:
    """scaling (rows A^T) B^T: factors of x's dtype keep that dtype; others are widened to at least fp32."""
    if f"{name}_lora_a" not in own:
        return 0.0
    a, b = own[f"{name}_lora_a"], own[f"{name}_lora_b"]
    dtype = rows.dtype if a.dtype == rows.dtype else torch.promote_types(rows.dtype, torch.float32)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (linear(linear(rows.to(dtype), a.to(dtype)), b.to(dtype)) * scaling).to(wide)


def activated(z: Tensor, config: MoEConfig) -> Tensor:
    """h [n, I] of z [n, J] (E1)."""
    if not config.gated:
        if config.activation == "relu2":
            return relu(z) * relu(z)
        return silu(z) if config.activation == "silu" else _gelu(z, config)
    gate, up = halves(z, config)
    if config.activation != "swiglu":
        return _gelu(gate, config) * up
    if config.limit is not None:
        gate = gate if config.clamp == "after" else gate.clamp(max=config.limit)
        up = up.clamp(-config.limit, config.limit)
    value = capped(gate, config.gate_softcap) * torch.sigmoid(config.alpha * gate)
    value = value.clamp(max=config.limit) if config.clamp == "after" else value
    return (capped(up, config.up_softcap) + config.up_offset) * value


def halves(z: Tensor, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """Gate and up [n, I]."""
    gate, up = (z[:, 0::2], z[:, 1::2]) if config.gate_up_layout == "interleaved" else z.chunk(2, dim=1)
    return gate, up


def capped(half: Tensor, cap: float | None) -> Tensor:
    """cap tanh(v / cap), or the value itself (E1)."""
    return half if cap is None else cap * torch.tanh(half / cap)


def normalized(o: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """o' [n, H]: n = gamma o, divided by the root of its mean square (E8)."""
    n = gamma * o
    return n / (n.square().mean(dim=1, keepdim=True) + eps).sqrt()


def _gelu(gate: Tensor, config: MoEConfig) -> Tensor:
    return gelu(gate, approximate="tanh" if config.activation.endswith("_tanh") else "none")


def rounded_at_every_site(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The specification, rounding to nearest wherever it may and overflowing nowhere (E7)."""
    return specified(x, ids, w, weights, Nearest(dtype_name(x), overflows=frozenset()))


def specified(x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, rounding: Rounding) -> Tensor:
    """Runs the specification as an executor, forward and backward, with a rounding policy."""
    weights = replace(weights, expert_scale=None)  # ignored where routing is given (R9)
    parameters = weights.parameters()
    return _Twin.apply(x, ids, w, weights, rounding, *parameters.values())  # type: ignore[no-untyped-call]


class _Twin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, rounding: Rounding, *_: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, ids, w)
        ctx.weights, ctx.rounding = weights, rounding
        y = _y_and_gradients(x, ids, w, weights, torch.zeros_like(x), rounding)[0]
        return torch.from_numpy(y).to(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, w = ctx.saved_tensors
        _, gradients = _y_and_gradients(x, ids, w, ctx.weights, dy, ctx.rounding)
        owners = {"x": x, "topk_weights": w, **ctx.weights.parameters()}
        dx, dw, *others = (torch.from_numpy(np.asarray(getattr(gradients, n))).to(owners[n]) for n in owners)
        return dx, None, dw, None, None, *others


def _y_and_gradients(
    x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, dy: Tensor, rounding: Rounding
) -> tuple[np.ndarray, MoEGradients]:
    def numpy(value: Tensor) -> np.ndarray:
        return value.detach().double().cpu().numpy()

    packed = {name: value.map(lambda array: array.cpu().numpy()) for name, value in weights.packed().items()}
    arrays = weights.map(numpy).with_parameters(packed)
    with np.errstate(invalid="ignore"):  # inf - inf, where a rounding overflows
        return layer_vjp(numpy(x), None, ids.cpu().numpy(), numpy(w), arrays, numpy(dy), rounding)
