"""Launches the kernel that chooses and weighs experts."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from executors.triton import _interpreter
from executors.triton._autograd import no_backward
from executors.triton._device import INTERPRETED, device_guard
from executors.triton.kernels.routing import route_kernel
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
    ids, topk_weights = operator(
        router_logits,
        None if bias is None else bias.detach(),
        dtype_name(weights.gate_up_proj) == "float64" or router_logits.dtype == torch.float64,
        config.top_k,
        config.scoring,
        config.renormalize,
        float(config.renormalize_eps),
        float(config.routed_scaling_factor),
        config.num_groups,
        config.topk_groups,
        config.group_score,
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
    num_groups: int,
    topk_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """Ids [T, K] int32 and weights [T, K], float64 if ``wide``, else float32."""
    if INTERPRETED:
        _interpreter.mend()
    tokens, experts = router_logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=router_logits.device)
    weights = torch.empty(ids.shape, dtype=torch.float64 if wide else torch.float32, device=ids.device)
    if not tokens:
        return ids, weights
    block_e = triton.next_power_of_2(experts)
    block_t = max(1, ELEMENTS // block_e)
    with device_guard(router_logits):
        route_kernel[(triton.cdiv(tokens, block_t),)](
            router_logits,
            router_logits if selection_bias is None else selection_bias,
            ids,
            weights,
            tokens,
            experts,
            *router_logits.stride(),
            0 if selection_bias is None else selection_bias.stride(0),
            TOP_K=top_k,
            SCORING=scoring,
            RENORMALIZE=renormalize,
            EPS=eps,
            SCALING=scaling,
            HAS_BIAS=selection_bias is not None,
            NUM_GROUPS=num_groups,
            TOPK_GROUPS=topk_groups,
            TOP2=group_score == "top2_sum",
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(top_k),
            BLOCK_G=triton.next_power_of_2(num_groups),
        )
    return ids, weights


@operator.register_fake
def _(router_logits: Tensor, _bias: Tensor | None, wide: bool, top_k: int, *_others: object) -> tuple[Tensor, Tensor]:
    shape = router_logits.shape[0], top_k
    wide_dtype = torch.float64 if wide else torch.float32
    return router_logits.new_empty(shape, dtype=torch.int32), router_logits.new_empty(shape, dtype=wide_dtype)


operator.register_autograd(no_backward)
