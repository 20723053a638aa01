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
        top_k=draw(st.integers(1, min(experts, 6)) | st.just(min(experts, 8)), label="top_k"),
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

    Args:
        draw: given by Hypothesis.
        dtypes: for x and the projections.
        routing: False for executors that only take ids and weights.
    """
    floats = st.sampled_from(DTYPES)
    tokens = draw(TOKENS, label="tokens")
    experts = draw(EXPERTS, label="experts")
    config = draw(configs(experts), label="config")
    entry = draw(st.sampled_from(["layer", "experts"]), label="entry") if routing else "experts"
    layer = entry == "layer"
    routed = "router_logits" if layer else "topk_weights"
    x_layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]), label="x_layout")
    # A sum of equal terms errs systematically, not as a random walk: never x and dy constant at once.
    dy_layouts = ["contiguous", "transposed", "sliced", *(["scalar"] if x_layout != "expanded" else [])]
    dy_layout = draw(st.sampled_from(dy_layouts), label="dy_layout")
    ordered = [d for d in DTYPES if d in dtypes]
    return Problem(
        tokens=tokens,
        experts=experts,
        hidden=draw(WIDTHS, label="hidden"),
        intermediate=draw(WIDTHS, label="intermediate"),
        config=config,
        dtype=draw(st.sampled_from(ordered), label="dtype"),
        entry=entry,
        routing_dtype=draw(floats, label="routing_dtype"),
        ids_dtype=draw(st.sampled_from(["int64", "int32"]), label="ids_dtype"),
        bias_dtype=draw(floats, label="bias_dtype"),
        gate_up_bias=draw(st.booleans(), label="gate_up_bias"),
        down_bias=draw(st.booleans(), label="down_bias"),
        logits=draw(st.sampled_from(["random", "ties", "masked", "skewed"]), label="logits") if layer else "random",
        cut_points=not layer and draw(st.booleans(), label="cut_points"),
        empty_slots=not layer and draw(st.booleans(), label="empty_slots"),
        broken_logits=draw(st.integers(0, min(3, tokens)), label="broken_logits") if layer else 0,
        broken_x=draw(st.integers(0, min(1, tokens)), label="broken_x") if x_layout != "expanded" else 0,
        batch=draw(st.booleans(), label="batch"),
        x_layout=x_layout,
        weights_layout=draw(st.sampled_from(["contiguous", "transposed", "sliced"]), label="weights_layout"),
        dy_layout=dy_layout,
        frozen=draw(st.frozensets(st.sampled_from(["x", routed, *PARAMETERS])), label="frozen"),
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
    )


def problems_for(executor: Executor) -> st.SearchStrategy[Problem]:
    """Problems within an executor's declared capabilities."""
    capabilities = executor.capabilities
    return problems(capabilities.dtypes, capabilities.routing)
