"""Hypothesis strategies that draw whole problems. They shrink towards T=0, E=1, K=1 and plain features."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from hypothesis import strategies as st

from moe_ref.conformance.problems.declared import takes_dtype, without_undeclared
from moe_ref.conformance.problems.packed import in_whole_blocks
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import (
    DENSE,
    GATED,
    LEARNED,
    Activation,
    MoEConfig,
    QuantType,
    RenormalizeForm,
    Scoring,
    SelectionKey,
)
from moe_ref.validation.nf4 import BLOCKSIZES, DECODED_DTYPES

if TYPE_CHECKING:
    from executors import Executor

TOKENS = st.one_of(st.integers(0, 9), st.sampled_from([16, 33, 64, 130]))
EXPERTS = st.one_of(st.integers(1, 9), st.sampled_from([16, 33]))
WIDTHS = st.sampled_from([1, 7, 8, 16, 17, 32, 50, 64])
ACTIVATIONS = get_args(Activation)
DTYPES = ("float32", "bfloat16", "float16", "float64")
WEIGHTS = ("dense", "nf4", "fp4", "mxfp4")
# Powers of two with which a layer in fp16 passes the range inside, but hardly in y or a gradient (E7). Weights times h,
# and dh without weights, keep an ordinary size: the error of subnormal numbers depends on where the weight is applied.
SCALED_INPUT = (
    (("gate_up_proj", 8), ("down_proj", -5), ("dy", -6)),  # h
    (("down_lora_a", 16), ("down_lora_b", -6), ("dy", -6)),  # between an adapter's factors
    (("x", 4), ("topk_weights", 12), ("gate_up_proj", -14), ("dy", -4)),  # w x
)
SCALED_OUTPUT = (
    (("x", 3), ("gate_up_proj", 13), ("topk_weights", -32)),  # z, h, o
    (("x[0]", 8), ("gate_up_proj", 7), ("topk_weights", -20)),  # of one token
    (("gate_up_proj", 6), ("down_proj", 6), ("topk_weights", -12)),  # o
    (("x", 3), ("gate_up_proj", 3), ("topk_weights", -12), ("dy", 8), ("down_proj", 8)),  # dh without its weight, o
    (("gate_up_proj", 4), ("down_lora_a", 9), ("down_lora_b", -4), ("topk_weights", -8)),  # between factors
)


@st.composite
def configs(draw: st.DrawFn, experts: int, activations: Collection[str] = ACTIVATIONS) -> MoEConfig:
    """A configuration for a layer of ``experts`` experts."""
    wanted = draw(st.sampled_from([1, 1, 2, 3, 4, 8]), label="num_groups")
    groups = wanted if experts % wanted == 0 else 1
    kept = min(draw(st.integers(1, 4), label="topk_groups"), groups)
    size = experts // groups
    top_k = min(draw(st.integers(1, 8), label="top_k"), kept * size)
    group_score = draw(st.sampled_from(["max", "top2_sum"]), label="group_score")
    activation = draw(st.sampled_from([a for a in ACTIVATIONS if a in activations]), label="activation")
    alpha = draw(st.sampled_from([1.0, 1.702]), label="alpha")
    limit = draw(st.sampled_from([None, 0.5, 1.0, 7.0]), label="limit")
    up_offset = draw(st.sampled_from([0.0, 1.0]), label="up_offset")
    clamp = draw(st.sampled_from(["before", "after"]), label="clamp")
    has_caps = draw(st.sampled_from([False, False, True]), label="caps instead of a limit")
    caps = [draw(st.sampled_from([None, 0.5, 2.0, 7.0]), label=f"{half}_softcap") for half in ("gate", "up")]
    layout = draw(st.sampled_from(["concatenated", "interleaved"]), label="gate_up_layout")
    gated, swiglu = activation in GATED, activation == "swiglu"
    gate_softcap, up_softcap = caps if swiglu and has_caps else (None, None)
    limit = limit if swiglu and not has_caps else None
    return MoEConfig(
        top_k=top_k,
        scoring=draw(st.sampled_from(get_args(Scoring)), label="scoring"),
        renormalize=draw(st.booleans(), label="renormalize"),
        renormalize_eps=draw(st.sampled_from([1e-20, 1e-6, 0.1, 0.7]), label="renormalize_eps"),
        renormalize_form=draw(st.sampled_from(get_args(RenormalizeForm)), label="renormalize_form"),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5]), label="routed_scaling_factor"),
        num_groups=groups,
        topk_groups=kept,
        group_score=group_score if size > 1 else "max",  # type: ignore[arg-type]
        selection_key=draw(st.sampled_from(get_args(SelectionKey)), label="selection_key"),
        scale_input=draw(st.booleans(), label="scale_input"),
        activation=activation,
        alpha=alpha if swiglu else 1.0,
        limit=limit,
        up_offset=up_offset if swiglu else 0.0,
        clamp=clamp if limit is not None else "before",  # type: ignore[arg-type]
        gate_softcap=gate_softcap,
        up_softcap=up_softcap,
        gate_up_layout=layout if gated else "concatenated",  # type: ignore[arg-type]
    )


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: Collection[str] = DTYPES,
    activations: Collection[str] = ACTIVATIONS,
    routing: bool = True,
    weights: Collection[str] = ("dense",),
    mixed: bool = False,
) -> Problem:
    """Draws a whole problem.

    Every problem makes the same draws, used or not. Hypothesis takes fewer draws for simpler, and would otherwise
    shrink towards whatever draws less.

    Args:
        draw: given by Hypothesis.
        dtypes: dtypes of x and the projections.
        activations: activations of the configuration.
        routing: False for executors that take only ids and weights.
        weights: kinds of projections, of "dense", "nf4", "fp4" and "mxfp4"; "mxfp4" rounds widths up.
        mixed: whether the two projections may be of different kinds, or one of them dense.
    """
    tokens = draw(TOKENS, label="tokens")
    experts = draw(EXPERTS, label="experts")
    config = draw(configs(experts, activations), label="config")
    by_logits = draw(st.sampled_from([True, False]), label="entry is the layer") and routing
    logits = draw(st.sampled_from(["random", "ties", "masked", "skewed", "shifted", "close"]), label="logits")
    broken_logits = draw(st.integers(0, 3), label="broken_logits")
    cut_points = draw(st.booleans(), label="cut_points")
    empty_slots = draw(st.booleans(), label="empty_slots")
    x_layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]), label="x_layout")
    dy_layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "scalar"]), label="dy_layout")
    broken_x = draw(st.integers(0, 1), label="broken_x")
    frozen = draw(st.frozensets(st.sampled_from(["x", "routing", *LEARNED])), label="frozen")
    base_frozen = draw(st.booleans(), label="base_frozen")
    selection_bias = draw(st.sampled_from(["", "small", "large"]), label="selection_bias")
    expert_scale = draw(st.booleans(), label="expert_scale")
    scale_ignored = expert_scale and not by_logits  # where ids and weights are given (R9)
    post_expert_norm = draw(st.sampled_from([False, False, True]), label="post_expert_norm")
    norm_eps = draw(st.sampled_from([1e-6, 1e-8, 0.1, 1.0]), label="post_expert_norm_eps")
    all_equal = x_layout == "expanded"
    kind = draw(st.sampled_from([k for k in WEIGHTS if k in weights]), label="weights")
    other = draw(st.sampled_from(["", "", *WEIGHTS]), label="weights of the other projection")
    swapped = draw(st.booleans(), label="gate_up_proj is the other projection")
    blocksize = draw(st.sampled_from(BLOCKSIZES), label="blocksize")
    nested = draw(st.sampled_from(["", "one", "per expert"]), label="nested")
    kinds = _two_kinds(kind, other if mixed and other in {*weights, "dense"} else "", swapped)
    dense, in_nf4 = {*kinds} == {"dense"}, not {*kinds}.isdisjoint(get_args(QuantType))
    quant_type, down_quant_type = ("" if kind == "dense" else kind for kind in kinds)
    allowed = [d for d in DTYPES if d in dtypes and (dense or d in DECODED_DTYPES)]
    hidden, intermediate = draw(WIDTHS, label="hidden"), draw(WIDTHS, label="intermediate")
    if hidden == intermediate == 1 and all_equal:  # one number for all tokens: every error is a systematic one
        x_layout, all_equal = "contiguous", False
    if post_expert_norm:  # with a small epsilon a single number is but its sign, and the weight of an input is lost
        config = replace(config, post_expert_norm_eps=1.0 if hidden == 1 or config.scale_input else norm_eps)
    problem = Problem(
        tokens=tokens,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        config=config,
        dtype=draw(st.sampled_from(allowed), label="dtype"),
        entry="layer" if by_logits else "experts",
        routing_dtype=draw(st.sampled_from(DTYPES), label="routing_dtype"),
        ids_dtype=draw(st.sampled_from(["int64", "int32"]), label="ids_dtype"),
        bias_dtype=draw(st.sampled_from(DTYPES), label="bias_dtype"),
        gate_up_bias=draw(st.booleans(), label="gate_up_bias"),
        down_bias=draw(st.booleans(), label="down_bias"),
        selection_bias=selection_bias if by_logits else "",
        expert_scale=expert_scale,
        post_expert_norm=post_expert_norm,
        gate_up_rank=draw(st.sampled_from([0, 0, 1, 4]), label="gate_up_rank"),
        down_rank=draw(st.sampled_from([0, 0, 1, 3]), label="down_rank"),
        lora_dtype=draw(st.sampled_from(DTYPES), label="lora_dtype"),
        quant_type=quant_type,
        down_quant_type=None if down_quant_type == quant_type else down_quant_type,
        blocksize=blocksize if in_nf4 else 64,
        nested=nested if in_nf4 else "",
        logits=logits if by_logits else "random",
        cut_points=cut_points and not by_logits,
        empty_slots=empty_slots and not by_logits,
        broken_logits=min(broken_logits, tokens) if by_logits else 0,
        broken_x=min(broken_x, tokens) if not all_equal else 0,
        batch=draw(st.booleans(), label="batch"),
        x_layout=x_layout,
        weights_layout=draw(st.sampled_from(["contiguous", "transposed", "sliced"]), label="weights_layout"),
        # x and dy are never both constant: a sum of equal terms errs systematically, not as a random walk.
        dy_layout="contiguous" if all_equal and dy_layout == "scalar" else dy_layout,
        routing_layout=draw(st.sampled_from(["contiguous", "sliced"]), label="routing_layout"),
        top_k_given=draw(st.sampled_from([True, False]), label="top_k_given") or by_logits,
        frozen=frozenset(
            _frozen(name, by_logits)
            for name in {*frozen, *(DENSE if base_frozen else ()), *(("expert_scale",) if scale_ignored else ())}
        ),
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
    )
    return in_whole_blocks(problem)


@st.composite
def problems_past_range(draw: st.DrawFn, executor: Executor) -> Problem:
    """Draws problems in fp16 in which intermediate values pass fp16's range, but hardly any result does (E7).

    Args:
        draw: given by Hypothesis.
        executor: the problems stay within its capabilities.
    """
    able = executor.capabilities
    ordinary = problems(("float16",), able.activations, able.routing, able.weights, able.mixed)
    problem = without_undeclared(draw(ordinary, label="ordinary problem"), able)
    config = problem.config
    powers = draw(st.sampled_from(SCALED_INPUT if config.scale_input else SCALED_OUTPUT), label="powers")
    if problem.post_expert_norm and not config.scale_input:  # which undoes what the weights are to undo
        powers = tuple((name, power) for name, power in powers if name != "topk_weights")
    by_logits = problem.entry == "layer"
    declared = able.router_logits_dtypes if by_logits else able.topk_weights_dtypes
    dtype = next((d for d in DTYPES if takes_dtype(d, "float16", declared)), "float16")
    if dtype == "float16" and not by_logits and any(name == "topk_weights" for name, _ in powers):
        powers = ()  # which holds no weights as small as these
    problem = replace(problem, powers=powers, broken_logits=0, broken_x=0, routing_dtype=dtype)
    if by_logits:  # weights computed from logits share one factor
        factor = config.routed_scaling_factor * problem.factor("topk_weights")
        problem = replace(problem, config=replace(config, routed_scaling_factor=factor))
    return problem


def _two_kinds(kind: str, other: str, swapped: bool) -> tuple[str, str]:
    """The kinds of gate_up_proj and down_proj, where ``other`` is the kind of one of them, or ""."""
    other = other or kind
    return (other, kind) if swapped else (kind, other)


def _frozen(name: str, by_logits: bool) -> str:
    if name != "routing":
        return name
    return "router_logits" if by_logits else "topk_weights"


def problems_for(executor: Executor) -> st.SearchStrategy[Problem]:
    """Draws problems within an executor's declared capabilities."""
    able = executor.capabilities
    drawn = problems(able.dtypes, able.activations, able.routing, able.weights, able.mixed)
    return drawn.map(lambda problem: without_undeclared(problem, able))
