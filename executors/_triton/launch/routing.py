"""Launches the kernels that choose and weigh experts, and that carry gradients back to the logits."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from executors._triton import interpreter
from executors._triton.device import INTERPRETED, device_guard
from executors._triton.kernels.routing import route_backward_kernel, route_kernel
from moe_ref.types import MoEWeights, Routing
from moe_ref.validation import dtype_name

ELEMENTS = 1024  # of the logits in one program


def route(router_logits: Tensor, weights: MoEWeights) -> Routing:
    """Chooses K experts for each token and weighs them, in one launch.

    Scores are computed in the widest of the projections' dtype, the logits' dtype and fp32.

    Args:
        router_logits: [T, E], any float dtype, any strides, read exactly.
        weights: the layer's parameters and configuration; ``config.top_k`` must be set.

    Returns:
        Routing with topk_ids [T, K] int32, ordered by (key descending, id ascending), and topk_weights [T, K].
    """
    config, bias = weights.config, weights.selection_bias
    assert config.top_k is not None
    topk_weights, ids = operator(
        router_logits,
        None if bias is None else bias.detach(),
        dtype_name(weights.gate_up_proj) == "float64" or router_logits.dtype == torch.float64,
        config.top_k,
        config.scoring,
        config.renormalize,
        float(config.renormalize_eps),
        float(config.routed_scaling_factor),
        config.renormalize_form,
        config.num_groups,
        config.topk_groups,
        config.group_score,
        config.selection_key,
    )
    return Routing(ids, topk_weights)


@torch.library.custom_op("moe_ref::triton_route", mutates_args=())
def operator(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    wide: bool,
    top_k: int,
    scoring: str,
    renormalize: bool,
    eps: float,
    scaling: float,
    form: str,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    selection_key: str,
) -> tuple[Tensor, Tensor]:
    """Weights [T, K], float64 if ``wide``, else float32, and ids [T, K] int32."""
    if INTERPRETED:
        interpreter.mend()
    tokens = router_logits.shape[0]
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=router_logits.device)
    weights = torch.empty(ids.shape, dtype=torch.float64 if wide else torch.float32, device=ids.device)
    if not tokens:
        return weights, ids
    blocks = _blocks(router_logits, top_k)
    with device_guard(router_logits):
        route_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            router_logits,
            router_logits if selection_bias is None else selection_bias,
            ids,
            weights,
            tokens,
            router_logits.shape[1],
            router_logits.stride(),
            0 if selection_bias is None else selection_bias.stride(0),
            TOP_K=top_k,
            SCORING=scoring,
            RENORMALIZE=renormalize,
            MAX=form == "max",
            EPS=eps,
            SCALING=scaling,
            HAS_BIAS=selection_bias is not None,
            NUM_GROUPS=num_groups,
            TOPK_GROUPS=topk_groups,
            TOP2=group_score == "top2_sum",
            BY_LOGIT=selection_key == "logit",
            **blocks,
            BLOCK_G=triton.next_power_of_2(num_groups),
            enable_fp_fusion=False,  # lanes sum products: each must round them alike (C1)
        )
    return weights, ids


@operator.register_fake
def _(router_logits: Tensor, _bias: Tensor | None, wide: bool, top_k: int, *_others: object) -> tuple[Tensor, Tensor]:
    shape = router_logits.shape[0], top_k
    wide_dtype = torch.float64 if wide else torch.float32
    return router_logits.new_empty(shape, dtype=wide_dtype), router_logits.new_empty(shape, dtype=torch.int32)


@operator.register_vmap
def _(info: Any, dims: Any, router_logits: Tensor, selection_bias: Tensor | None, *choice: Any) -> tuple[Any, Any]:
    of_logits, of_bias = dims[:2]
    if of_bias is None:  # rows do not depend on each other
        found = operator(router_logits.movedim(of_logits, 0).flatten(0, 1), selection_bias, *choice)
        return tuple(own.unflatten(0, (info.batch_size, -1)) for own in found), (0, 0)
    assert selection_bias is not None
    parts = [
        operator(
            router_logits if of_logits is None else router_logits.select(of_logits, place),
            selection_bias.select(of_bias, place),
            *choice,
        )
        for place in range(info.batch_size)
    ]
    return tuple(torch.stack(own) for own in zip(*parts, strict=True)), (0, 0)


@torch.library.custom_op("moe_ref::triton_route_backward", mutates_args=())
def backward_operator(
    gradients: Tensor,
    topk_ids: Tensor,
    router_logits: Tensor,
    scoring: str,
    renormalize: bool,
    eps: float,
    scaling: float,
    form: str,
) -> Tensor:
    """The gradient of router_logits [T, E], contiguous, from that of topk_weights [T, K] (D1)."""
    if INTERPRETED:
        interpreter.mend()
    (tokens, top_k), out = topk_ids.shape, torch.empty_like(router_logits, memory_format=torch.contiguous_format)
    if not tokens:
        return out
    blocks = _blocks(router_logits, top_k)
    with device_guard(router_logits):
        route_backward_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            gradients.contiguous(),
            router_logits,
            topk_ids.contiguous(),
            out,
            tokens,
            router_logits.shape[1],
            router_logits.stride(),
            TOP_K=top_k,
            SCORING=scoring,
            RENORMALIZE=renormalize,
            MAX=form == "max",
            EPS=eps,
            SCALING=scaling,
            **blocks,
            enable_fp_fusion=False,  # lanes sum products: each must round them alike (C1)
        )
    return out


@backward_operator.register_fake
def _(_gradients: Tensor, _ids: Tensor, router_logits: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


def _blocks(router_logits: Tensor, top_k: int) -> dict[str, int]:
    block_e = triton.next_power_of_2(router_logits.shape[1])
    return {
        "BLOCK_T": max(1, ELEMENTS // block_e),
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(top_k),
    }


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    router_logits, _bias, _wide, _top_k, *ctx.static = inputs[:9]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], router_logits)


def _autograd(ctx: Any, gradients: Tensor, _of_ids: Tensor | None) -> tuple[Any, ...]:
    return backward_operator(gradients, *ctx.saved_tensors, *ctx.static), *(None for _ in range(12))


def _no_double_backward(_ctx: Any, *_gradients: Tensor) -> None:
    raise RuntimeError("triton: double backward is not supported; differentiate with create_graph=False")


operator.register_autograd(_autograd, setup_context=_setup_context)
backward_operator.register_autograd(_no_double_backward)
