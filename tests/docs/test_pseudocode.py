"""The algorithms of docs/spec.md give what moe_ref gives: they are read from the page and run on drawn problems."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pseudocode
from moe_ref import MoEConfig, moe_vjp, mxfp4, nf4, route, routed_experts_vjp
from moe_ref.activations import activation, activation_vjp
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.pinned import DEEPSEEK_V4, ERNIE, GPT_OSS, GROUPED, INKLING2, KOLIBRI, MUSE, STEP
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems
from moe_ref.conformance.profiles import current
from moe_ref.routing import route_vjp
from moe_ref.types import MoEWeights, NF4Tensor
from random_nf4 import equal_bits, tensors

PAGE = pseudocode.read()
FULL: dict[str, Any] = {"gate_up_bias": True, "down_bias": True, "gate_up_rank": 2, "down_rank": 1}


def small(problem: Problem) -> Problem:
    """In float64, of a few tokens and narrow, for loops in Python."""
    experts = problem.experts
    return replace(
        problem,
        tokens=max(1, min(problem.tokens, 9)),
        hidden=min(problem.hidden, 7),
        intermediate=min(problem.intermediate, 8),
        dtype="float64",
        routing_dtype="float64",
        broken_logits=min(problem.broken_logits, 2),
        broken_x=min(problem.broken_x, 1),
        experts=experts,
    )


DRAWN = problems(("float64",)).map(small)


@settings(current(), max_examples=current().max_examples // 2)
@given(problem=DRAWN)
@example(problem=Problem(9, 8, 5, 6, GPT_OSS, "float64", **FULL))
@example(problem=Problem(9, 8, 5, 6, replace(STEP, limit=0.5), "float64", **FULL))
@example(problem=Problem(9, 8, 5, 6, INKLING2, "float64", **FULL))
@example(problem=Problem(9, 9, 5, 6, ERNIE, "float64", expert_scale=True, selection_bias="infinite"))
@example(problem=Problem(9, 9, 5, 6, replace(ERNIE, top_k=3, renormalize_eps=0.7), "float64", expert_scale=True))
@example(problem=Problem(9, 8, 5, 6, replace(MUSE, scale_input=True), "float64", post_expert_norm=True, **FULL))
@example(problem=Problem(9, 8, 5, 6, GROUPED, "float64", logits="masked", selection_bias="infinite", seed=60))
@example(problem=Problem(9, 3, 5, 6, replace(KOLIBRI, top_k=1), "float64", logits="masked", selection_bias="infinite"))
@example(problem=Problem(9, 8, 5, 6, DEEPSEEK_V4, "float64", logits="masked", broken_logits=2, broken_x=1))
@example(problem=Problem(9, 8, 5, 6, MoEConfig(2), "float64", "experts", empty_slots=True, cut_points=True, **FULL))
def test_layer_and_gradients(problem: Problem) -> None:
    """R2, R4, R5, R7, R9, G1, E1, E6, E8, C1, C3, D1, D2, D3: the page's forward and backward algorithms."""
    arrays = build(problem)
    x, ids, weights, dy = arrays.x, arrays.topk_ids, arrays.weights, arrays.dy
    with np.errstate(all="ignore"):
        if arrays.router_logits is not None:
            y = PAGE.moe(x, arrays.router_logits, weights)
            dx, dlogits, dw, found = PAGE.moe_vjp(x, arrays.router_logits, weights, dy)
            found |= {"x": dx, "router_logits": dlogits, "topk_weights": dw, "y": y}
            expected_y, expected = moe_vjp(x, arrays.router_logits, weights, dy)
        else:
            y = PAGE.routed_experts(x, ids, arrays.topk_weights, weights)
            dx, dw, found = PAGE.routed_experts_vjp(x, ids, arrays.topk_weights, weights, dy)
            found |= {"x": dx, "topk_weights": dw, "y": y}
            expected_y, expected = routed_experts_vjp(x, ids, arrays.topk_weights, weights, dy)
            found.pop("expert_scale", None)  # frozen here (R9)
    broken = broken_tokens(arrays, problem.config)
    free = np.zeros(problem.experts, dtype=bool)
    free[ids[broken][(ids[broken] >= 0) & (ids[broken] < problem.experts)]] = True
    for name, actual in found.items():
        wanted = expected_y if name == "y" else getattr(expected, name)
        if name in ("x", "router_logits", "topk_weights", "y"):
            judged = ~np.isinf(x).any(axis=1) if name == "y" else ~broken
        elif name == "post_expert_norm":
            judged = np.full(len(wanted), not broken.any())
        else:
            judged = ~free
        size = 1e-9 * np.abs(wanted[judged], where=np.isfinite(wanted[judged]), out=np.zeros_like(wanted[judged]))
        tolerance = size.max(initial=1e-12)
        np.testing.assert_allclose(actual[judged], wanted[judged], rtol=1e-9, atol=tolerance, err_msg=name)


def broken_tokens(arrays: Arrays, config: MoEConfig) -> np.ndarray:
    """[T]: tokens of which a gradient of their own may be anything (R4)."""
    broken = ~np.isfinite(arrays.x).all(axis=1)
    if arrays.router_logits is None:
        return broken
    with np.errstate(invalid="ignore"):
        weights = route(arrays.router_logits, config, arrays.weights.selection_bias).topk_weights
    return broken | np.isnan(weights).any(axis=1)


@settings(current(), max_examples=current().max_examples // 2)
@given(problem=DRAWN)
def test_routing(problem: Problem) -> None:
    """R2, R4, R5: ids and weights, token by token; any ids in an undefined row."""
    arrays, config = build(replace(problem, entry="layer", cut_points=False, empty_slots=False)), problem.config
    if config.top_k is None or arrays.router_logits is None:
        return
    weights = arrays.weights
    with np.errstate(all="ignore"):
        expected = route(arrays.router_logits, config, weights.selection_bias, expert_scale=weights.expert_scale)
        for t, row in enumerate(arrays.router_logits):
            ids, own = PAGE.route(row, weights)
            undefined = np.isnan(expected.topk_weights[t]).all()
            assert np.isnan(own).all() == undefined
            if undefined:
                assert len(set(ids.tolist())) == config.top_k
                continue
            assert ids.tolist() == expected.topk_ids[t].tolist()
            np.testing.assert_allclose(own, expected.topk_weights[t], rtol=1e-12)


INF, NAN = math.inf, math.nan
SUM = MoEConfig(1, renormalize=True, renormalize_eps=0.5, renormalize_form="max")
ROWS: list[tuple[list[float], MoEConfig, list[float]]] = [  # logits, configuration, selection bias
    ([3.0, 2.0, 1.0, 0.0], MoEConfig(2, "sigmoid"), [NAN, -INF, 0.0, -INF]),  # a NaN equals -inf: the lower id
    ([0.0] * 6, MoEConfig(4, "sigmoid", num_groups=3, topk_groups=2, group_score="top2_sum"), [INF, *[-INF] * 3, 0, 0]),
    ([-INF, -INF, 0.0], MoEConfig(2, "sigmoid", True, 0.0), [0.0, 0.0, -INF]),  # a sum of 0
    ([-INF, -INF, 0.0], MoEConfig(2, "sqrtsoftplus", True, 0.0, renormalize_form="max"), [0.0, 0.0, -INF]),
    ([INF, 0.0, 1.0], MoEConfig(2, "sqrtsoftplus"), [0.0] * 3),  # undefined
    ([INF, 0.0, 1.0], MoEConfig(2, "sigmoid"), [0.0] * 3),
    ([-INF] * 3, MoEConfig(2, "topk_softmax"), [0.0] * 3),
    ([0.0, 0.0], SUM, [0.0, 0.0]),  # the sum equals the epsilon
    ([0.0, 0.0], replace(SUM, renormalize_eps=0.75), [0.0, 0.0]),  # and is below it
]


@pytest.mark.parametrize(("row", "config", "bias"), ROWS)
def test_edges_of_routing(row: list[float], config: MoEConfig, bias: list[float]) -> None:
    """R2, R4, R5, D1."""
    size, logits = len(row), np.array(row)
    weights = MoEWeights(np.zeros((size, 2, 1)), np.zeros((size, 1, 1)), selection_bias=np.array(bias), config=config)
    dw = np.arange(1.0, 1.0 + (config.top_k or 0))
    with np.errstate(all="ignore"):
        expected = route(logits[None], config, weights.selection_bias)
        ids, own = PAGE.route(logits, weights)
        gradient, _ = PAGE.route_vjp(logits, expected.topk_ids[0], dw, weights)
        wanted = route_vjp(logits[None], expected.topk_ids, config, dw[None])[0]
    np.testing.assert_allclose(own, expected.topk_weights[0], rtol=1e-14)
    if not np.isnan(own).any():  # ids and gradients of an undefined row may be anything
        assert ids.tolist() == expected.topk_ids[0].tolist()
        np.testing.assert_allclose(gradient, wanted, rtol=1e-14, atol=1e-16)


FORMS = [
    *(MoEConfig(1, activation=name) for name in ("geglu", "geglu_tanh", "silu", "gelu", "gelu_tanh", "relu2")),
    *(
        MoEConfig(1, alpha=1.702, limit=limit, up_offset=1.0, clamp=clamp, gate_up_layout=layout)
        for limit, clamp, layout in product((0.5, 1.0), ("before", "after"), ("concatenated", "interleaved"))
    ),
    MoEConfig(1, alpha=0.0, limit=0.5, clamp="after"),  # act(1) is the limit
    *(MoEConfig(1, alpha=1.702, gate_softcap=gate, up_softcap=up) for gate, up in product((None, 0.5), (None, 2.0))),
]


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_activations_and_their_derivatives(config: MoEConfig) -> None:
    """E1: the table, also where a limit is met exactly, and at 0."""
    values = np.array([-30.0, -7.0, -1.0, -0.5, -0.0, 0.3, 0.5, 1.0, 7.0, 30.0])
    z = np.array(list(product(values, values)))
    dh = np.linspace(-1, 2, z.shape[0])[:, None] * np.ones((1, 1 if config.gated else 2))
    np.testing.assert_allclose(PAGE.activation(z, config), activation(z, config), rtol=1e-12, atol=1e-15)
    actual, expected = PAGE.activation_vjp(z, dh, config), activation_vjp(z, config, dh)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)


@settings(current(), max_examples=current().max_examples // 5)
@given(tensor=tensors(segments=True, ranks=(3,)))
def test_nf4_decoding(tensor: NF4Tensor) -> None:
    """Q1, Q2, Q3, Q5: number by number."""
    with np.errstate(all="ignore"):
        stored = nf4.decode(tensor)
        stored = (stored.swapaxes(1, 2) if tensor.transposed else stored).reshape(-1)
        places = np.unique(np.linspace(0, max(0, tensor.size - 1), min(tensor.size, 40)).astype(int))
        numbers = [PAGE.nf4_number(int(i), tensor) for i in places]
    assert equal_bits(np.array(numbers, dtype=np.float32), stored[places]).all()


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
@settings(current(), max_examples=current().max_examples // 5)
def test_mxfp4_decoding(seed: int, dtype: str) -> None:
    """M1: every code under any exponent."""
    rng = np.random.default_rng(seed)
    blocks, scales = rng.integers(0, 256, (2, 2, 1, 16), np.uint8), rng.integers(0, 256, (2, 2, 1), np.uint8)
    tensor = mxfp4.MXFP4Tensor(blocks, scales, dtype=dtype)
    with np.errstate(all="ignore"):
        expected = mxfp4.decode(tensor)
        numbers = [[[PAGE.mxfp4_number((e, m), j, tensor) for j in range(32)] for m in range(2)] for e in range(2)]
    assert equal_bits(np.array(numbers, dtype=np.float32), expected).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [1.0, 1e-39, 0.0])
def test_quantising(quant_type: str, size: float) -> None:
    """Q4: codes, scales and nested statistics, with a partial last block, to the last bit."""
    values = (size * np.random.default_rng(0).standard_normal(64 * 300 + 7)).astype(np.float32)
    tensor = nf4.quantize(values, dtype="float32", quant_type=quant_type, nested=True)  # type: ignore[arg-type]
    plain = nf4.quantize(values, dtype="float32", quant_type=quant_type)  # type: ignore[arg-type]
    pairs = [PAGE.quantize_block(values[i : i + 64], nf4.CODES[quant_type]) for i in range(0, len(values), 64)]
    absmax = np.array([scale for _, scale in pairs], dtype=np.float32)
    codes = [code for own, _ in pairs for code in own]
    assert codes == nf4.unpack(plain.packed, len(values)).tolist()
    assert equal_bits(absmax, plain.absmax).all()
    found, scales, offset = PAGE.nest(absmax)
    assert found == tensor.absmax.tolist()
    assert equal_bits(np.array(scales, dtype=np.float32), tensor.nested_absmax).all()
    assert offset == tensor.nested_offset


def test_nested_blocks_in_segments() -> None:
    """Q3, Q5: three blocks for each expert, two of them in a nested block."""
    code = np.arange(256, dtype=np.float32)
    scales, offsets = np.array([1, 10, 100, 1000], np.float32), np.array([0.5, 0.25], np.float32)
    nested: dict[str, Any] = {"nested_absmax": scales, "nested_code": code, "nested_offset": offsets}
    sizes: dict[str, Any] = {"shape": (2, 1, 96), "blocksize": 32, "nested_blocksize": 2}
    absmax = np.array([1, 1, 1, 2, 2, 2], np.uint8)
    tensor = NF4Tensor(np.full(96, 0xF7, np.uint8), absmax, **nested, **sizes, dtype="float32")
    assert [PAGE.absmax_of_block(block, tensor) for block in range(6)] == nf4.absmax_of(tensor).tolist()


def test_ties_take_the_lower_number() -> None:
    """Q4: all midpoints of both codes."""
    for quant_type in ("nf4", "fp4"):
        table = np.array(sorted(set(nf4.CODES[quant_type])), np.float32)  # type: ignore[index]
        values = np.concatenate([(table[1:] + table[:-1]) / np.float32(2), np.ones(1, np.float32)])
        codes, _ = PAGE.quantize_block(values, nf4.CODES[quant_type])  # type: ignore[index]
        packed = nf4.quantize(values, dtype="float32", quant_type=quant_type).packed  # type: ignore[arg-type]
        assert codes == nf4.unpack(packed, len(values)).tolist()


def test_the_8_bit_code() -> None:
    """Q4: all 256 numbers; float64's roundings do not reach fp32."""
    numbers = np.array(PAGE.dynamic_code())
    assert tuple(numbers) == nf4.dynamic_code()
    for factor in (1 - 1e-14, 1 + 1e-14):
        assert ((numbers * factor).astype(np.float32) == numbers.astype(np.float32)).all()
