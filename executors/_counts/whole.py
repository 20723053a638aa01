"""Counts of the kernels that choose, sort and sum: executed at the layer's own sizes."""

from __future__ import annotations

from fractions import Fraction

import torch

from executors._bench.layers import Shape
from executors._counts.fit import Counts, times
from executors._counts.slices import COUNTED, TARGET, labelled
from executors._triton.launch.grouping import group
from executors._triton.launch.products import combine
from executors._triton.launch.routing import backward_operator, route
from moe_ref.conformance.ptx.executed import executed
from moe_ref.types import MoEWeights

ROUTED = 256  # tokens; routing takes a token as long as any other
SUMMED = 8  # tokens


def routing(shape: Shape, tokens: int, backward: bool) -> Counts:
    """``route``, and ``route_backward``: of up to `ROUTED` tokens, times what is left."""
    some = min(tokens, ROUTED)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(some, shape.experts, generator=generator).to(shape.routing_dtype)
    none = logits.new_zeros(shape.experts, 0, 0)
    config = shape.config
    with executed(TARGET, COUNTED) as ran:
        routed = route(logits, MoEWeights(none, none, config=config))
        static = config.scoring, config.renormalize, config.renormalize_eps, 1.0, config.renormalize_form
        if backward:
            backward_operator(routed.topk_weights, routed.topk_ids, logits, *static)
    return _times(labelled(ran.counts, []), Fraction(tokens, some))


def sorting(shape: Shape, tokens: int, block_m: int) -> Counts:
    """The kernels that sort slots by expert, for all tokens."""
    ids = torch.arange(tokens * shape.top_k, dtype=torch.int32).view(tokens, shape.top_k) % shape.experts
    with executed(TARGET, COUNTED) as ran:
        group(ids, shape.experts, block_m)
    return labelled(ran.counts, [])


def summing(shape: Shape, tokens: int, dtype: torch.dtype, backward: bool) -> Counts:
    """``combine``, forward and backward: of up to `SUMMED` tokens, times what is left."""
    some = min(tokens, SUMMED)
    ids = torch.arange(some * shape.top_k, dtype=torch.int32).view(some, shape.top_k) % shape.experts
    slots = torch.randn(some * shape.top_k, shape.hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.ones(some, shape.top_k) if shape.config.scale_input else None
    with executed(TARGET, COUNTED) as ran:
        combine(slots, dtype, ids, shape.experts)
        if backward:
            combine(slots, dtype, ids, shape.experts, weights)
    return _times(labelled(ran.counts[:1], ran.counts[1:]), Fraction(tokens, some))


def _times(counts: Counts, by: Fraction) -> Counts:
    return {label: times(own, by) for label, own in counts.items()}
