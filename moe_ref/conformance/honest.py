"""Right executors that round elsewhere or add in another order. The suite must accept every one of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_ref.conformance.mutants import Wrapped, experts
from moe_ref.conformance.problem import PARAMETERS
from moe_ref.layer import apply_experts
from moe_ref.numerics import Nearest
from moe_ref.types import MoEGradients, MoEWeights
from moe_ref.validation import dtype_name
from moe_ref.vjp import layer_vjp

if TYPE_CHECKING:
    from executors import Executor


def honest_variants(inner: Executor) -> dict[str, Wrapped]:
    """Every honest variant, by name."""
    changes = (fp32_throughout, features_reversed, weight_before_down_projection, rounded_at_every_site)
    return {change.__name__: Wrapped(change.__name__, inner, slots=change) for change in changes}


def fp32_throughout(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Rounds nothing but the result: x and the projections are widened first."""
    wide = torch.promote_types(x.dtype, torch.float32)
    widened = replace(weights, gate_up_proj=weights.gate_up_proj.to(wide), down_proj=weights.down_proj.to(wide))
    return experts(inner, x.to(wide), ids, w, widened).to(x.dtype)


def features_reversed(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Adds the products in the opposite order."""
    bias = weights.down_proj_bias
    flipped = replace(
        weights,
        gate_up_proj=weights.gate_up_proj.flip(2),
        down_proj=weights.down_proj.flip(1),
        down_proj_bias=None if bias is None else bias.flip(1),
    )
    return experts(inner, x.flip(1), ids, w, flipped).flip(1)


def weight_before_down_projection(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A loop of plain torch, every step rounded to x's dtype, with the routing weight on h."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    config = weights.config
    for e in range(weights.num_experts):
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        weight = w[tokens, slots, None].to(wide)
        z = linear(x[tokens], weights.gate_up_proj[e])
        if weights.gate_up_proj_bias is not None:
            z = (z + weights.gate_up_proj_bias[e].to(wide)).to(x.dtype)
        gate, up = (z[:, 0::2], z[:, 1::2]) if config.gate_up_layout == "interleaved" else z.chunk(2, dim=1)
        if config.limit is not None:
            gate, up = gate.clamp(max=config.limit), up.clamp(-config.limit, config.limit)
        act = gate.to(wide) * torch.sigmoid(config.alpha * gate.to(wide))
        h = ((up.to(wide) + config.up_offset) * act * weight).to(x.dtype)
        o = linear(h, weights.down_proj[e]).to(wide)
        if weights.down_proj_bias is not None:
            o = o + weight * weights.down_proj_bias[e].to(wide)
        y = y.index_add(0, tokens, o)
    return y.to(x.dtype)


def rounded_at_every_site(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The specification itself, rounding to nearest wherever it may."""
    tensors = [getattr(weights, name) for name in PARAMETERS]
    return _Twin.apply(x, ids, w, weights.config, *tensors)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class _Flat:
    x: np.ndarray
    ids: np.ndarray
    topk_weights: np.ndarray
    weights: MoEWeights


def _flat(x: Tensor, ids: Tensor, w: Tensor, config: Any, parameters: tuple[Tensor | None, ...]) -> _Flat:
    def numpy(value: Tensor | None) -> Any:
        return None if value is None else value.detach().double().cpu().numpy()

    weights = MoEWeights(*map(numpy, parameters), config=config)
    return _Flat(numpy(x), ids.cpu().numpy(), numpy(w), weights)


class _Twin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, w: Tensor, config: Any, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, ids, w, *parameters)
        ctx.config = config
        flat = _flat(x, ids, w, config, parameters)
        y = apply_experts(flat.x, flat.ids, flat.topk_weights, flat.weights, Nearest(dtype_name(x)))
        return torch.from_numpy(y).to(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, w, *parameters = ctx.saved_tensors
        flat = _flat(x, ids, w, ctx.config, tuple(parameters))
        upstream = dy.double().cpu().numpy()
        _, gradients = layer_vjp(
            flat.x, None, flat.ids, flat.topk_weights, flat.weights, upstream, Nearest(dtype_name(x))
        )

        def back(name: str, like: Tensor | None) -> Tensor | None:
            value = getattr(gradients, name)
            return None if like is None or value is None else torch.from_numpy(np.asarray(value)).to(like)

        assert {f.name for f in fields(MoEGradients)} >= set(PARAMETERS)
        named = zip(PARAMETERS, parameters, strict=True)
        return back("x", x), None, back("topk_weights", w), None, *(back(name, p) for name, p in named)
