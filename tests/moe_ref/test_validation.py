"""Bad input to the specification: the type of the error, and its one line, word for word.

`moe_ref.conformance.judgement.errors` checks that executors say the same.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref import MoEConfig, MoEWeights, moe, moe_vjp, routed_experts, routed_experts_vjp
from moe_ref.conformance.judgement import errors
from moe_ref.conformance.judgement.call import to_torch
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.validation import check_config, check_router_logits
from moe_ref.validation.arrays import check_devices

E, K, H, I = 5, 2, 4, 3  # noqa: E741
FLOATS = "must be one of float64, float32, bfloat16, float16"
IDS = "must be one of int32, int64"
SCORINGS = "'softmax', 'topk_softmax', 'sigmoid', 'sqrtsoftplus'"
NAN, INF = float("nan"), float("inf")

GOOD: dict[str, Any] = {
    "x": np.ones((2, 3, H)),
    "router_logits": np.ones((2, 3, E)),
    "topk_ids": np.ones((2, 3, K), dtype=np.int64),
    "topk_weights": np.ones((2, 3, K)),
    "dy": np.ones((2, 3, H)),
    "gate_up_proj": np.ones((E, 2 * I, H)),
    "down_proj": np.ones((E, H, I)),
    "gate_up_proj_bias": np.ones((E, 2 * I)),
    "down_proj_bias": np.ones((E, H)),
    "config": MoEConfig(K),
}
PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias", "config")
OF_ROUTING = ("selection_bias", "expert_scale")


def call(function: Callable[..., Any], changes: dict[str, Any]) -> Any:
    """Calls one of the four public functions with some arguments, or fields of the configuration, changed."""
    fields = {name: value for name, value in changes.items() if name not in {*GOOD, *OF_ROUTING, "weights"}}
    given = {**GOOD, "config": replace(GOOD["config"], **fields), **changes}
    own = {name: given[name] for name in (*PARAMETERS, *OF_ROUTING) if name in given}
    weights = changes.get("weights") or MoEWeights(**own)
    routing = ("topk_ids", "topk_weights") if function in (routed_experts, routed_experts_vjp) else ("router_logits",)
    upstream = ("dy",) if function in (moe_vjp, routed_experts_vjp) else ()
    return function(*(given[name] for name in ("x", *routing)), weights, *(given[name] for name in upstream))


def assert_refused(functions: tuple[Callable[..., Any], ...], changes: dict[str, Any], error: type, line: str) -> None:
    for function in functions:
        with pytest.raises(error, match=f"^{re.escape(line)}$") as caught:
            call(function, changes)
        assert type(caught.value) is error


# What every entry refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        # x
        ({"x": [1.0, 2.0]}, TypeError, "x=[1.0, 2.0]: must be an array"),
        ({"x": None}, TypeError, "x=None: must be an array"),
        ({"x": "a" * 99}, TypeError, f"x='{'a' * 56}...: must be an array"),
        ({"x": np.ones((2, 3, H), dtype=int)}, TypeError, f"x.dtype=int64: {FLOATS}"),
        ({"x": np.ones((2, 3, H), dtype=complex)}, TypeError, f"x.dtype=complex128: {FLOATS}"),
        ({"x": np.ones((2, 3, H), dtype=np.float32)}, TypeError, "x.dtype=float32: must be float64, gate_up_proj's"),
        (
            {"x": np.ones((2, 3, H + 1))},
            ValueError,
            "x.shape=(2, 3, 5): must be (..., 4), the last dimension H of gate_up_proj",
        ),
        (
            {"x": np.float64(1)},
            ValueError,
            "x.shape=(): must be (..., 4), the last dimension H of gate_up_proj",
        ),
        # weights
        ({"weights": 7}, TypeError, "weights=7: must be a moe_ref.MoEWeights"),
        ({"gate_up_proj": None}, TypeError, "gate_up_proj=None: must be an array"),
        (
            {"down_proj": [1]},
            TypeError,
            "down_proj is a list of 1: must be an array, which moe_ref.MoEWeights.stack makes of it, once",
        ),
        ({"gate_up_proj_bias": 0.5}, TypeError, "gate_up_proj_bias=0.5: must be an array"),
        ({"gate_up_proj": np.ones((E, 2 * I, H), dtype=bool)}, TypeError, f"gate_up_proj.dtype=bool: {FLOATS}"),
        ({"down_proj_bias": np.ones((E, H), dtype=int)}, TypeError, f"down_proj_bias.dtype=int64: {FLOATS}"),
        (
            {"down_proj": np.ones((E, H, I), dtype=np.float16)},
            TypeError,
            "down_proj.dtype=float16: must be float64, gate_up_proj's",
        ),
        (
            {"gate_up_proj": np.ones((E, H))},
            ValueError,
            "gate_up_proj.shape=(5, 4): must be (E, 2*I, H), each at least 1",
        ),
        (
            {"gate_up_proj": np.ones((E, 2 * I + 1, H))},
            ValueError,
            "gate_up_proj.shape=(5, 7, 4): must be (E, 2*I, H), each at least 1",
        ),
        (
            {"gate_up_proj": np.ones((0, 2 * I, H))},
            ValueError,
            "gate_up_proj.shape=(0, 6, 4): must be (E, 2*I, H), each at least 1",
        ),
        (
            {"gate_up_proj": np.ones((E, 2 * I, 0))},
            ValueError,
            "gate_up_proj.shape=(5, 6, 0): must be (E, 2*I, H), each at least 1",
        ),
        (
            {"down_proj": np.ones((E, I, H))},
            ValueError,
            "down_proj.shape=(5, 3, 4): must be (5, 4, 3), (E, H, I) to match gate_up_proj (E, 2*I, H); "
            "stored in the other order? pass down_proj.transpose(1, 2)",
        ),
        (
            {"gate_up_proj": np.ones((E, H, 2 * I))},
            ValueError,
            "down_proj.shape=(5, 4, 3): must be (5, 6, 2), (E, H, I) to match gate_up_proj (E, 2*I, H); "
            "stored in the other order? pass gate_up_proj.transpose(1, 2)",
        ),
        (
            {"gate_up_proj": np.ones((E, H, 2 * I)), "down_proj": np.ones((E, I, H))},
            ValueError,
            "down_proj.shape=(5, 3, 4): must be (5, 6, 2), (E, H, I) to match gate_up_proj (E, 2*I, H); "
            "stored in the other order? pass gate_up_proj.transpose(1, 2) and down_proj.transpose(1, 2)",
        ),
        (
            {"down_proj": np.ones((E - 1, H, I))},
            ValueError,
            "down_proj.shape=(4, 4, 3): must be (5, 4, 3), (E, H, I) to match gate_up_proj (E, 2*I, H)",
        ),
        (
            {"gate_up_proj_bias": np.ones((E, I))},
            ValueError,
            "gate_up_proj_bias.shape=(5, 3): must be (5, 6), (E, 2*I)",
        ),
        ({"down_proj_bias": np.ones(H)}, ValueError, "down_proj_bias.shape=(4,): must be (5, 4), (E, H)"),
        (
            {"down_proj": np.ones((E, H, 2 * I))},
            ValueError,
            "down_proj.shape=(5, 4, 6): must be (5, 4, 3), (E, H, I) to match gate_up_proj (E, 2*I, H); "
            "gate and up stored apart? moe_ref.MoEWeights.stack fuses them, once; executors.nf4.fuse in 4 bits",
        ),
        (
            {"gate_up_proj": [np.ones((2 * I, H))] * E},
            TypeError,
            "gate_up_proj is a list of 5: must be an array, which moe_ref.MoEWeights.stack makes of it, once",
        ),
        ({"selection_bias": np.ones(E, dtype=int)}, TypeError, f"selection_bias.dtype=int64: {FLOATS}"),
        ({"expert_scale": 2.0}, TypeError, "expert_scale=2.0: must be an array"),
        # config
        ({"config": None}, TypeError, "config=None: must be a moe_ref.MoEConfig"),
        ({"config": {"top_k": 2}}, TypeError, "config={'top_k': 2}: must be a moe_ref.MoEConfig"),
        ({"top_k": 0}, ValueError, "top_k=0: must be at least 1"),
        ({"top_k": -1}, ValueError, "top_k=-1: must be at least 1"),
        ({"top_k": 2.0}, TypeError, "top_k=2.0: must be an integer"),
        ({"top_k": True}, TypeError, "top_k=True: must be an integer"),
        ({"top_k": "2"}, TypeError, "top_k='2': must be an integer"),
        ({"scoring": "relu"}, ValueError, f"scoring='relu': must be one of {SCORINGS}"),
        ({"scoring": None}, ValueError, f"scoring=None: must be one of {SCORINGS}"),
        ({"selection_key": "bias"}, ValueError, "selection_key='bias': must be one of 'score', 'logit'"),
        ({"renormalize_form": True}, ValueError, "renormalize_form=True: must be one of 'add', 'max'"),
        (
            {"gate_up_layout": "packed"},
            ValueError,
            "gate_up_layout='packed': must be one of 'concatenated', 'interleaved'",
        ),
        ({"renormalize": 1}, TypeError, "renormalize=1: must be True or False"),
        ({"renormalize_eps": -1e-9}, ValueError, "renormalize_eps=-1e-09: must be at least 0"),
        ({"renormalize_eps": NAN}, ValueError, "renormalize_eps=nan: must be finite"),
        ({"routed_scaling_factor": INF}, ValueError, "routed_scaling_factor=inf: must be finite"),
        ({"alpha": "1.702"}, TypeError, "alpha='1.702': must be a float or int"),
        ({"alpha": True}, TypeError, "alpha=True: must be a float or int"),
        ({"up_offset": None}, TypeError, "up_offset=None: must be a float or int"),
        ({"limit": 0}, ValueError, "limit=0: must be positive, or None for no clamp"),
        ({"limit": INF}, ValueError, "limit=inf: must be finite"),
        ({"limit": [7.0]}, TypeError, "limit=[7.0]: must be a float or int"),
        ({"limit": 7.0, "clamp": None}, ValueError, "clamp=None: must be one of 'before', 'after'"),
        ({"clamp": "after"}, ValueError, "clamp='after': must be 'before' with limit=None, which clamps nothing"),
        ({"gate_softcap": 0.0}, ValueError, "gate_softcap=0.0: must be positive, or None for no cap"),
        ({"up_softcap": -1}, ValueError, "up_softcap=-1: must be positive, or None for no cap"),
        ({"up_softcap": NAN}, ValueError, "up_softcap=nan: must be finite"),
        ({"gate_softcap": "5"}, TypeError, "gate_softcap='5': must be a float or int"),
        (
            {"post_expert_norm_eps": 0},
            ValueError,
            "post_expert_norm_eps=0: must be at least 1.2e-38, so that an output of zeros has a norm in fp32",
        ),
        ({"post_expert_norm_eps": INF}, ValueError, "post_expert_norm_eps=inf: must be finite"),
        ({"post_expert_norm_eps": None}, TypeError, "post_expert_norm_eps=None: must be a float or int"),
        (
            {"limit": 7.0, "gate_softcap": 5.0},
            ValueError,
            "gate_softcap=5.0: must be None with limit=7.0, which clamps",
        ),
        (
            {"activation": "geglu", "up_softcap": 5.0},
            ValueError,
            "up_softcap=5.0: must be None for activation='geglu' (others are for 'swiglu' only)",
        ),
    ],
)
def test_refused_by_every_entry(changes: dict[str, Any], error: type, line: str) -> None:
    assert_refused((moe, routed_experts, moe_vjp, routed_experts_vjp), changes, error, line)


def test_unknown_activation_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^activation='tanh': must be one of 'swiglu'"):
        call(moe, {"activation": "tanh"})


# What one entry refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"router_logits": 0.0}, TypeError, "router_logits=0.0: must be an array"),
        ({"router_logits": np.ones((2, 3, E), dtype=int)}, TypeError, f"router_logits.dtype=int64: {FLOATS}"),
        (
            {"router_logits": np.ones((2, 3, E + 1))},
            ValueError,
            "router_logits.shape=(2, 3, 6): must be (2, 3, 5), x's leading dimensions and E",
        ),
        (
            {"router_logits": np.ones((6, E))},
            ValueError,
            "router_logits.shape=(6, 5): must be (2, 3, 5), x's leading dimensions and E",
        ),
        ({"top_k": None}, ValueError, "top_k=None: must be an integer from 1 to E, unless topk_ids are given"),
        ({"top_k": E + 1}, ValueError, "top_k=6: must be at least 1 and at most 5 (E)"),
        ({"num_groups": 2}, ValueError, "num_groups=2: must be a divisor of 5 (E)"),
        ({"selection_bias": np.ones(E + 1)}, ValueError, "selection_bias.shape=(6,): must be (5,), (E,)"),
        ({"expert_scale": np.ones(E - 1)}, ValueError, "expert_scale.shape=(4,): must be (5,), (E,)"),
    ],
)
def test_refused_by_the_layer(changes: dict[str, Any], error: type, line: str) -> None:
    assert_refused((moe, moe_vjp), changes, error, line)


K_WANTED = "must be (2, 3, K), x's leading dimensions and K of at least 1"


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"topk_ids": [[0]]}, TypeError, "topk_ids=[[0]]: must be an array"),
        ({"topk_ids": np.ones((2, 3, K))}, TypeError, f"topk_ids.dtype=float64: {IDS}"),
        ({"topk_ids": np.ones((2, 3, K), dtype=np.int16)}, TypeError, f"topk_ids.dtype=int16: {IDS}"),
        ({"topk_ids": np.ones((2, 3, K), dtype=np.uint64)}, TypeError, f"topk_ids.dtype=uint64: {IDS}"),
        ({"topk_ids": np.ones((6, K), dtype=int)}, ValueError, f"topk_ids.shape=(6, 2): {K_WANTED}"),
        ({"topk_ids": np.ones((2, 3), dtype=int)}, ValueError, f"topk_ids.shape=(2, 3): {K_WANTED}"),
        ({"topk_ids": np.ones((2, 3, 0), dtype=int)}, ValueError, f"topk_ids.shape=(2, 3, 0): {K_WANTED}"),
        ({"topk_weights": None}, TypeError, "topk_weights=None: must be an array"),
        ({"topk_weights": np.ones((2, 3, K), dtype=int)}, TypeError, f"topk_weights.dtype=int64: {FLOATS}"),
        (
            {"topk_weights": np.ones((2, 3, K + 1))},
            ValueError,
            "topk_weights.shape=(2, 3, 3): must be (2, 3, 2), the shape of topk_ids",
        ),
    ],
)
def test_refused_where_routing_is_given(changes: dict[str, Any], error: type, line: str) -> None:
    assert_refused((routed_experts, routed_experts_vjp), changes, error, line)


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"dy": 1.0}, TypeError, "dy=1.0: must be an array"),
        ({"dy": np.ones((2, 3, H), dtype=int)}, TypeError, f"dy.dtype=int64: {FLOATS}"),
        ({"dy": np.ones((2, 3, 1))}, ValueError, "dy.shape=(2, 3, 1): must be (2, 3, 4), x's shape"),
        ({"dy": torch.ones(2, 3, H)}, TypeError, "dy is a torch array: must be a numpy array, as x"),
    ],
)
def test_refused_by_the_backward_pass(changes: dict[str, Any], error: type, line: str) -> None:
    assert_refused((moe_vjp, routed_experts_vjp), changes, error, line)


# Libraries and devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other"),
    [("x", "gate_up_proj"), ("router_logits", "x"), ("down_proj", "gate_up_proj"), ("down_proj_bias", "gate_up_proj")],
)
def test_libraries_do_not_mix(name: str, other: str) -> None:
    line = f"{name} is a torch array: must be a numpy array, as {other}"
    assert_refused((moe, moe_vjp), {name: torch.from_numpy(GOOD[name])}, TypeError, line)


@pytest.mark.parametrize("name", ["topk_ids", "topk_weights"])
def test_libraries_do_not_mix_in_routing(name: str) -> None:
    line = f"{name} is a torch array: must be a numpy array, as x"
    assert_refused((routed_experts, routed_experts_vjp), {name: torch.from_numpy(GOOD[name])}, TypeError, line)


def in_torch() -> dict[str, Any]:
    arrays = {name: value for name, value in GOOD.items() if name != "config"}
    arrays |= {name: np.ones(E) for name in OF_ROUTING}
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("x", "gate_up_proj"),
        ("router_logits", "x"),
        ("gate_up_proj", "x"),
        ("down_proj", "x"),
        ("gate_up_proj_bias", "x"),
        ("down_proj_bias", "x"),
        ("selection_bias", "x"),
        ("expert_scale", "x"),
    ],
)
def test_devices_do_not_mix(name: str, other: str) -> None:
    tensors = in_torch()
    elsewhere = {name: tensors[name].to("meta")}
    assert_refused((moe,), tensors | elsewhere, ValueError, f"{name}.device=meta: must be cpu, {other}'s")


@pytest.mark.parametrize(("name", "other"), [("x", "gate_up_proj"), ("topk_ids", "x"), ("topk_weights", "x")])
def test_devices_do_not_mix_in_routing(name: str, other: str) -> None:
    tensors = in_torch()
    line = f"{name}.device=meta: must be cpu, {other}'s"
    assert_refused((routed_experts,), tensors | {name: tensors[name].to("meta")}, ValueError, line)


def test_a_layer_on_meta_is_what_differs() -> None:
    """Though most arguments are on meta, x is not told to go there."""
    tensors = in_torch()
    elsewhere = {name: tensors[name].to("meta") for name in (*PARAMETERS[:-1], *OF_ROUTING)}
    line = "gate_up_proj.device=meta: must be cpu, x's"
    assert_refused((moe, routed_experts), tensors | elsewhere, ValueError, line)


def test_what_only_routing_uses_may_be_elsewhere() -> None:
    """R8."""
    tensors = in_torch()
    elsewhere = {name: tensors[name].to("meta") for name in OF_ROUTING}
    assert call(routed_experts, tensors | elsewhere).shape == (2, 3, H)


@pytest.mark.parametrize(
    ("devices", "line"),
    [
        ("aab", "2.device=b: must be a, 0's"),
        ("abb", "0.device=a: must be b, 1's"),
        ("ab", "1.device=b: must be a, 0's"),
        (["meta", "meta", "a"], "0.device=meta: must be a, 2's"),
        (["a", "meta", "meta"], "1.device=meta: must be a, 0's"),
    ],
)
def test_the_device_named_is_the_rare_one_or_the_one_without_numbers(devices: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check_devices({str(i): SimpleNamespace(device=device) for i, device in enumerate(devices)})


# Accepted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate_up_proj_bias": None, "down_proj_bias": None},
        {"gate_up_proj_bias": np.ones((E, 2 * I), dtype=np.float16)},
        {"router_logits": np.ones((2, 3, E), dtype=np.float16)},
        {"topk_weights": np.ones((2, 3, K), dtype=np.float32)},
        {"topk_ids": np.ones((2, 3, K), dtype=np.int32)},
        {"topk_ids": np.full((2, 3, K), -7)},
        {"top_k": E, "topk_ids": np.ones((2, 3, E + 1), dtype=int), "topk_weights": np.ones((2, 3, E + 1))},
        {"limit": 7, "alpha": 2, "up_offset": 1, "renormalize_eps": 0},
        {"limit": 7, "clamp": "after"},
        {"gate_softcap": 4, "alpha": 2, "up_offset": 1},
        {"gate_softcap": 4.0, "up_softcap": 25.0},
        {"post_expert_norm_eps": 1.2e-38},
        {"gate_up_proj": np.ones((E, H, 2 * I)).transpose(0, 2, 1)},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    for function in (moe, routed_experts):
        assert call(function, changes).shape == (2, 3, H)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (0, 3), (2, 0)])
def test_any_leading_dimensions_are_accepted(leading: tuple[int, ...]) -> None:
    tokens = {name: np.ones((*leading, GOOD[name].shape[-1])) for name in ("x", "router_logits", "topk_weights", "dy")}
    tokens["topk_ids"] = np.ones((*leading, K), dtype=int)
    for function in (moe, routed_experts):
        assert call(function, tokens).shape == (*leading, H)
    for function in (moe_vjp, routed_experts_vjp):
        assert call(function, tokens)[1].x.shape == (*leading, H)


def test_top_k_may_be_left_open_where_routing_is_given() -> None:
    assert call(routed_experts, {"top_k": None}).shape == (2, 3, H)


def test_top_k_has_no_upper_bound_until_the_experts_are_known() -> None:
    check_config(MoEConfig(1000))
    with pytest.raises(ValueError, match=r"^top_k=0: must be at least 1$"):
        check_config(MoEConfig(0))


# route's own arguments, and the conformance suite's list ---------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "config", "line"),
    [
        (np.ones((3, E + 1)), MoEConfig(K), "router_logits.shape=(3, 6): must be (..., 5), the last dimension E"),
        (np.float64(1), MoEConfig(K), "router_logits.shape=(): must be (..., 5), the last dimension E"),
        (np.ones((3, E)), MoEConfig(None), "top_k=None: must be an integer from 1 to E, to choose experts"),
    ],
)
def test_refused_by_route(logits: Any, config: MoEConfig, line: str) -> None:
    weights = MoEWeights(GOOD["gate_up_proj"], GOOD["down_proj"], config=config)
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check_router_logits(logits, weights)


SUITE = {"layer": errors.BAD_INPUTS | errors.LAYER_ONLY, "experts": errors.BAD_INPUTS | errors.EXPERTS_ONLY}


@pytest.mark.parametrize(("entry", "what"), [(entry, what) for entry, bad in SUITE.items() for what in bad])
def test_refused_in_one_line_as_the_suite_demands(entry: str, what: str) -> None:
    problem = Problem(4, 6, 8, 5, MoEConfig(2), entry=entry, gate_up_bias=True, down_bias=True)
    spoil, argument = SUITE[entry][what]
    bad = spoil(to_torch(problem, build(problem)))
    routing = (bad.router_logits,) if entry == "layer" else (bad.topk_ids, bad.topk_weights)
    function = moe if entry == "layer" else routed_experts
    with pytest.raises((ValueError, TypeError), match=rf"^{re.escape(argument)}[^\n]*: must be [^\n]*$"):
        function(bad.x, *routing, bad.weights)
