"""Hypothesis strategies that draw whole problems, shrinking towards T=0, E=1, K=1 and plain everything."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from moe_ref.conformance.problem import PARAMETERS, Problem
from moe_ref.types import MoEConfig

if TYPE_CHECKING:
    from executors import Executor

TOKENS = st.one_of(st.integers(0, 9), st.sampled_from([16, 33, 64, 130]))
EXPERTS = st.one_of(st.integers(1, 9), st.sampled_from([16, 33]))
WIDTHS = st.sampled_from([1, 7, 8, 16, 17, 32, 50, 64])
DTYPES = ("float32", "bfloat16", "float16", "float64")


@st.composite
def configs(draw: st.DrawFn, experts: int) -> MoEConfig:
    """A configuration for a layer of ``experts`` experts."""
    return MoEConfig(
        top_k=min(draw(st.integers(1, 8), label="top_k"), experts),
        scoring=draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid"]), label="scoring"),
        renormalize=draw(st.booleans(), label="renormalize"),
        renormalize_eps=draw(st.sampled_from([1e-20, 1e-6, 0.1]), label="renormalize_eps"),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5]), label="routed_scaling_factor"),
        alpha=draw(st.sampled_from([1.0, 1.702]), label="alpha"),
        limit=draw(st.sampled_from([None, 0.5, 1.0, 7.0]), label="limit"),
        up_offset=draw(st.sampled_from([0.0, 1.0]), label="up_offset"),
        gate_up_layout=draw(st.sampled_from(["concatenated", "interleaved"]), label="gate_up_layout"),
    )


@st.composite
def problems(draw: st.DrawFn, dtypes: Collection[str] = DTYPES, routing: bool = True) -> Problem:
    """A whole problem.

    Every problem makes the same draws, whether it uses them or not: Hypothesis takes fewer draws for simpler, and would
    otherwise shrink towards what happens to draw less.

    Args:
        draw: given by Hypothesis.
        dtypes: for x and the projections.
        routing: False for executors that only take ids and weights.
    """
    tokens = draw(TOKENS, label="tokens")
    experts = draw(EXPERTS, label="experts")
    config = draw(configs(experts), label="config")
    by_logits = draw(st.sampled_from([True, False]), label="entry is the layer") and routing
    logits = draw(st.sampled_from(["random", "ties", "masked", "skewed", "shifted", "close"]), label="logits")
    broken_logits = draw(st.integers(0, 3), label="broken_logits")
    cut_points = draw(st.booleans(), label="cut_points")
    empty_slots = draw(st.booleans(), label="empty_slots")
    x_layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]), label="x_layout")
    dy_layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "scalar"]), label="dy_layout")
    broken_x = draw(st.integers(0, 1), label="broken_x")
    frozen = draw(st.frozensets(st.sampled_from(["x", "routing", *PARAMETERS])), label="frozen")
    all_equal = x_layout == "expanded"
    return Problem(
        tokens=tokens,
        experts=experts,
        hidden=draw(WIDTHS, label="hidden"),
        intermediate=draw(WIDTHS, label="intermediate"),
        config=config,
        dtype=draw(st.sampled_from([d for d in DTYPES if d in dtypes]), label="dtype"),
        entry="layer" if by_logits else "experts",
        routing_dtype=draw(st.sampled_from(DTYPES), label="routing_dtype"),
        ids_dtype=draw(st.sampled_from(["int64", "int32"]), label="ids_dtype"),
        bias_dtype=draw(st.sampled_from(DTYPES), label="bias_dtype"),
        gate_up_bias=draw(st.booleans(), label="gate_up_bias"),
        down_bias=draw(st.booleans(), label="down_bias"),
        logits=logits if by_logits else "random",
        cut_points=cut_points and not by_logits,
        empty_slots=empty_slots and not by_logits,
        broken_logits=min(broken_logits, tokens) if by_logits else 0,
        broken_x=min(broken_x, tokens) if not all_equal else 0,
        batch=draw(st.booleans(), label="batch"),
        x_layout=x_layout,
        weights_layout=draw(st.sampled_from(["contiguous", "transposed", "sliced"]), label="weights_layout"),
        # A sum of equal terms errs systematically, not as a random walk: never x and dy constant at once.
        dy_layout="contiguous" if all_equal and dy_layout == "scalar" else dy_layout,
        routing_layout=draw(st.sampled_from(["contiguous", "sliced"]), label="routing_layout"),
        top_k_given=draw(st.sampled_from([True, False]), label="top_k_given") or by_logits,
        frozen=frozenset(_frozen(name, by_logits) for name in frozen),
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
    )


def _frozen(name: str, by_logits: bool) -> str:
    if name != "routing":
        return name
    return "router_logits" if by_logits else "topk_weights"


def problems_for(executor: Executor) -> st.SearchStrategy[Problem]:
    """Problems within an executor's declared capabilities."""
    capabilities = executor.capabilities
    return problems(capabilities.dtypes, capabilities.routing)
