"""Refusals name the argument that differs, and the call that helps, on every executor."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from every_executor import E, H, I, cases, every, in_kind, kind_of, layer, made, tokens
from moe_ref import MoEConfig, MoEWeights, moe, routed_experts
from moe_ref.conformance.judgement.errors import check_errors
from moe_ref.types import LORA_FACTORS, PROJECTIONS

Calls = dict[str, Callable[..., Any]]


def calls(name: str) -> Calls:
    """Each public call that computes, and the specification's."""
    executor = made(name)
    x, logits = tokens()
    given = {
        "x": x,
        "router_logits": logits,
        "topk_ids": torch.zeros(len(x), 1).long(),
        "topk_weights": torch.ones(len(x), 1),
    }

    def with_defaults(call: Callable[..., Any], *names: str) -> Callable[..., Any]:
        return lambda weights, **changes: call(*((given | changes)[n] for n in names), weights)

    slots = "x", "topk_ids", "topk_weights"
    return {
        "the layer": with_defaults(executor, "x", "router_logits"),
        "experts": with_defaults(
            lambda x, ids, w, weights: executor.experts(x, topk_ids=ids, topk_weights=w, weights=weights), *slots
        ),
        "route": with_defaults(executor.route, "router_logits"),
        "moe": with_defaults(moe, "x", "router_logits"),
        "routed_experts": with_defaults(routed_experts, *slots),
    }


def refusal(call: Callable[..., Any], weights: MoEWeights, **changes: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        call(weights, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# Devices ---------------------------------------------------------------------------------------------------------


def elsewhere(weights: MoEWeights, name: str) -> tuple[MoEWeights, list[str]]:
    """The layer with one argument on meta, of 4 bits one array after another; and the names that the messages give."""
    value = getattr(weights.lora if name in LORA_FACTORS else weights, name)
    if name in weights.packed():
        arrays = value.arrays()
        found = [replace(value, **{part: array.to("meta")}) for part, array in arrays.items()]
        return [replace(weights, **{name: tensor}) for tensor in found], [f"{name}.{part}" for part in arrays]
    if name in LORA_FACTORS:
        return [replace(weights, lora=replace(weights.lora, **{name: value.to("meta")}))], [name]
    return [replace(weights, **{name: value.to("meta")})], [name]


@cases("dense", "nested", "mxfp4", nightly=("mixed",))
def test_a_tensor_on_another_device_is_named(name: str, kind: str) -> None:
    """Whichever it is, in each call that uses it: with its device and that of the others."""
    weights, found = layer(name, kind, MoEConfig(2)), calls(name)
    for argument in (*PROJECTIONS, *weights.parameters(), "selection_bias", "post_expert_norm"):
        if getattr(weights.lora if argument in LORA_FACTORS else weights, argument) is None:
            continue
        ignored = ("experts", "routed_experts") if argument in ("selection_bias", "expert_scale") else ()
        for bad, named in zip(*elsewhere(weights, argument), strict=True):
            for what, call in found.items():
                if what not in ignored:
                    line = rf"^{re.escape(named)}\.device=meta: must be cpu, \S+'s$"
                    assert re.match(line, refusal(call, bad)), (what, named)


@every
def test_an_argument_of_the_call_on_another_device_is_named(name: str) -> None:
    weights, found = layer(name, kind_of(name), MoEConfig(2)), calls(name)
    x, logits = tokens()
    for argument, value, uses in (
        ("x", x, ("the layer", "experts", "moe", "routed_experts")),
        ("router_logits", logits, ("the layer", "moe", "route")),
        ("topk_ids", torch.zeros(len(x), 1).long(), ("experts", "routed_experts")),
        ("topk_weights", torch.ones(len(x), 1), ("experts", "routed_experts")),
    ):
        for what in uses:
            said = refusal(found[what], weights, **{argument: value.to("meta")})
            assert re.match(rf"^{argument}\.device=meta: must be cpu, \S+'s$", said), what


@cases("dense", "nf4", "mxfp4")
def test_a_layer_on_meta_is_what_differs(name: str, kind: str) -> None:
    """A model that was made on meta and not loaded: x is not told to go there."""
    weights = layer(name, kind, MoEConfig(2)).to("meta")
    first = "gate_up_proj" + {"nf4": ".packed", "mxfp4": ".blocks"}.get(kind, "")
    for what, call in calls(name).items():
        other = "router_logits" if what == "route" else "x"
        assert refusal(call, weights) == f"{first}.device=meta: must be cpu, {other}'s"


# Dtypes ----------------------------------------------------------------------------------------------------------


@cases("nf4", "fp4", "mxfp4", nightly=("nested",))
@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.nightly), "float32"])
def test_4_bits_stored_for_another_dtype(name: str, kind: str, dtype: str) -> None:
    """The message names the call that helps, and it does: no byte is copied, and the numbers are the new dtype's."""
    x, logits = tokens(dtype=getattr(torch, dtype))
    dense = MoEWeights(torch.randn(E, 2 * I, H), torch.randn(E, H, I), config=MoEConfig(2))
    weights = in_kind(dense.to(dtype=torch.bfloat16), kind)
    said = f"x.dtype={dtype}: must be bfloat16, gate_up_proj's; weights.to(dtype='{dtype}') makes 4 bits decode to x's"
    for what, call in calls(name).items():
        if what != "route":
            assert refusal(call, weights, x=x) == said
    (remedy,) = re.findall(r"weights\.to\(.*?\)", said)
    helped = eval(remedy, {"weights": weights})
    assert helped.gate_up_proj.codes is weights.gate_up_proj.codes
    y = made(name)(x, logits, helped)
    assert y.dtype == x.dtype
    exact = moe(x, logits, helped)
    assert (y.double() - exact).norm() < 1e-2 * exact.norm()


@cases("mixed")
def test_4_bits_beside_a_dense_projection_of_another_dtype(name: str, kind: str) -> None:
    weights = in_kind(MoEWeights(torch.randn(E, 2 * I, H), torch.randn(E, H, I), config=MoEConfig(2)), kind)
    for bad in (
        replace(weights, gate_up_proj=weights.gate_up_proj.bfloat16()),
        replace(weights, down_proj=weights.down_proj.to(dtype="bfloat16")),
    ):
        down, dense = bad.down_proj.dtype, str(bad.gate_up_proj.dtype).removeprefix("torch.")
        allowed = f"must be {dense}, gate_up_proj's; weights.to(dtype='{dense}') makes 4 bits decode to it"
        for call in calls(name).values():
            assert refusal(call, bad) == f"down_proj.dtype={down}: {allowed}"
    x, logits = tokens()
    assert made(name)(x, logits, bad.to(dtype=dense)).shape == x.shape


def test_4_bits_decode_to_no_float64() -> None:
    """So x is to be cast."""
    weights = in_kind(MoEWeights(torch.randn(E, 2 * I, H), torch.randn(E, H, I), config=MoEConfig(2)), "nf4")
    said = refusal(calls("native")["routed_experts"], weights, x=tokens()[0].double())
    assert (
        said
        == "x.dtype=float64: must be float32, gate_up_proj's; cast it with x.to(torch.float32), also under autocast"
    )


@every
def test_autocast_casts_no_argument(name: str) -> None:
    """T1: fp32 x beside bf16 weights is refused, as elsewhere; the message says what helps, and it does."""
    dense = MoEWeights(torch.randn(E, 2 * I, H), torch.randn(E, H, I), config=MoEConfig(2)).to(dtype=torch.bfloat16)
    weights = in_kind(dense, kind_of(name))
    x, logits = tokens()
    remedy = (
        "cast it with x.to(torch.bfloat16), also under autocast"
        if kind_of(name) == "dense"
        else "weights.to(dtype='float32') makes 4 bits decode to x's"
    )
    with torch.autocast("cpu", torch.bfloat16):
        for what, call in calls(name).items():
            if what != "route":
                assert refusal(call, weights) == f"x.dtype=float32: must be bfloat16, gate_up_proj's; {remedy}"
        y = made(name)(x.to(torch.bfloat16), logits, weights)
    assert torch.equal(y, made(name)(x.bfloat16(), logits, weights))


# Containers ------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("container", [list, tuple, torch.nn.ParameterList])
@pytest.mark.parametrize("argument", ["gate_up_proj", "down_proj", "down_proj_bias"])
def test_matrices_one_by_one_are_told_how_to_stack(name: str, container: type, argument: str) -> None:
    weights = layer(name, kind_of(name), MoEConfig(2))
    bad = replace(weights, **{argument: container([torch.ones(3, 4)] * E)})
    allowed = "must be an array, which moe_ref.MoEWeights.stack makes of it, once"
    for call in calls(name).values():
        assert refusal(call, bad) == f"{argument} is a {container.__name__} of {E}: {allowed}"


@every
def test_a_gate_without_its_up_is_told_how_to_fuse(name: str) -> None:
    weights = MoEWeights(torch.ones(E, I, H), torch.ones(E, H, I + 4), config=MoEConfig(2))
    weights = replace(weights, down_proj=torch.ones(E, H, I))
    hint = "; gate and up stored apart? moe_ref.MoEWeights.stack fuses them, once; executors.nf4.fuse in 4 bits"
    for call in calls(name).values():
        assert refusal(call, weights).endswith(hint)


# Whoever chooses an executor --------------------------------------------------------------------------------------


def test_auto_tells_bad_input_as_the_specification_does() -> None:
    """And not as what each of the executors lacks."""
    check_errors(made("auto"))
