"""Layers with projections of two kinds: dense beside 4 bits, and two formats of 4 bits (D1, Q1, M1)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import executors
from dense_cases import PROBLEM, arguments, demand_one_graph, demand_registered_right, each, inputs_of, needs_all
from executors import Capabilities
from executors._base.arguments import TENSORS
from executors.grouped_nf4 import GroupedNF4
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem, check_repeatable
from moe_ref.conformance.judgement.errors import check_undeclared_weights
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.problems.pinned import PACKED as PINNED
from moe_ref.conformance.problems.problem import Problem
from moe_ref.packed import decode
from packed_cases import PACKED_EVERYTHING, SLICED, WAYS, Sliced

MIXED = {
    "dense second": replace(PACKED_EVERYTHING, down_quant_type="", hidden=64, intermediate=32),
    "dense first": replace(PACKED_EVERYTHING, quant_type="", down_quant_type="mxfp4", hidden=64, intermediate=32),
    "two formats": replace(PACKED_EVERYTHING, down_quant_type="mxfp4", hidden=64, intermediate=32),
}
problems = pytest.mark.parametrize("problem", MIXED.values(), ids=MIXED)
both_ways = pytest.mark.parametrize("way", WAYS)


@dataclass(frozen=True)
class OneKind(GroupedNF4):
    """Takes 4 bits, but one format at a time."""

    name: ClassVar[str] = "one_kind"
    capabilities: ClassVar[Capabilities] = replace(GroupedNF4().capabilities, mixed=False)


def on_decoded_weights(inputs: Inputs) -> Inputs:
    dense = {name: decode(value).to(inputs.x.dtype) for name, value in inputs.weights.packed().items()}
    return replace(inputs, weights=inputs.weights.with_parameters(dense))


@both_ways
@problems
@pytest.mark.parametrize("recompute", [False, True])
def test_the_bits_are_those_of_decoded_weights(way: str, problem: Problem, recompute: bool) -> None:
    """D4, Q2, M1: with adapters, forward and backward; what is dense has its gradient, in its own order of storage."""
    inputs, dense = inputs_of(problem), on_decoded_weights(inputs_of(problem))
    y = call(WAYS[way](recompute=recompute), inputs)
    expected = call(executors.get("native" if way == "loop" else "grouped_mm"), dense)
    y.backward(inputs.dy)
    expected.backward(dense.dy)
    assert torch.equal(y, expected)
    projections = {"gate_up_proj", "down_proj"} & inputs.tensors().keys()
    assert len(projections) == 2 - len(inputs.weights.packed())
    for leaf, value in inputs.tensors().items():
        assert torch.equal(value.grad, dense.tensors()[leaf].grad), leaf
        assert leaf not in projections or value.grad.stride() == value.stride()


@pytest.mark.parametrize("problem", [p for p in PINNED if len(set(p.kinds)) > 1], ids=lambda p: "-".join(p.kinds))
def test_slices_hold_the_specification(problem: Problem) -> None:
    """The way of GPUs, on a CPU; fp16 too, whose products are widened (E7)."""
    check_problem(Sliced(), problem)
    check_repeatable(Sliced(), problem)


@problems
@pytest.mark.parametrize("way", ["loop", pytest.param("slices", marks=pytest.mark.nightly)])
def test_operators_are_registered_right(way: str, problem: Problem) -> None:
    operator = SLICED if way == "slices" else executors.get("grouped_nf4").operator
    demand_registered_right(operator, problem, keep_decoded=True)


@pytest.mark.parametrize("executor", ["grouped_nf4", pytest.param("numba", marks=pytest.mark.nightly)])
def test_compiles_whole_with_dynamic_tokens(executor: str) -> None:
    demand_one_graph(executors.get(executor), MIXED["dense second"])


def test_slices_never_look_at_a_value() -> None:
    """On tensors without values; what a host would have to wait for raises here."""
    for problem in MIXED.values():
        inputs = inputs_of(replace(problem, entry="experts", dtype="bfloat16", lora_dtype="bfloat16"))
        given = each(arguments(inputs), lambda t: t.detach().to("meta"))
        forward, backward, tangent = (kernel._init_fn.__wrapped__ for kernel in executors.get("grouped_nf4").operator)
        y, *kept = forward(*given, True, True)
        owners = [given[0], *given[2:TENSORS]]
        gradients = backward(y, *kept, needs_all(given), *given)
        for gradient, owner, needed in zip(gradients, owners, needs_all(given), strict=True):
            assert not needed or gradient.shape == owner.shape
        along = [owner if needed else None for owner, needed in zip(owners, needs_all(given), strict=True)]
        assert tangent(*along, *given).shape == y.shape


@problems
def test_auto_takes_them_to_grouped_nf4(problem: Problem) -> None:
    inputs = inputs_of(problem)
    name, why = executors.get("auto").choose(inputs.x, inputs.weights)
    assert name == "grouped_nf4"
    packed = min(inputs.weights.packed(), key=["gate_up_proj", "down_proj"].index)
    kind = inputs.weights.packed()[packed].quant_type
    assert f"native: {packed} is {kind}: must be dense for native; see grouped_nf4" in why
    usable = {row.name for row in executors.explain(inputs.x, inputs.weights) if row.usable}
    assert {"auto", "grouped_nf4", "numba"} <= usable
    assert usable.isdisjoint({"native", "grouped_mm"})


def test_numba_says_how_many_rows_of_each_are_compiled() -> None:
    inputs = inputs_of(replace(MIXED["dense second"], dtype="bfloat16"))
    note = executors.get("numba").note(inputs.x, inputs.weights)
    assert note.startswith("products of up to ")
    assert (" rows (down_proj)" in note) == ("rows of an expert are" not in note)


@problems
def test_who_does_not_declare_two_kinds_refuses_them(problem: Problem) -> None:
    """In one line; the suite demands it."""
    only, inputs = OneKind(), inputs_of(problem)
    first, second = problem.kinds
    expected = rf"^down_proj is {second}: must be {first} for one_kind, as gate_up_proj is$"
    if "dense" in problem.kinds:
        expected = r"^\w+ is dense: must be fp4 or mxfp4 or nf4 for one_kind; see executors.nf4$"
    with pytest.raises(executors.Unsupported, match=expected):
        call(only, inputs)
    check_undeclared_weights(only)
    assert not {name for name in mutants(only) if "beside" in name or name == "table_of_gate_up_proj_for_both"}


def test_two_kinds_taken_silently_are_seen() -> None:
    @dataclass(frozen=True)
    class Silent(OneKind):
        name: ClassVar[str] = "silent"

        def check(self, x, weights):  # type: ignore[no-untyped-def]
            if {"gate_up_proj", "down_proj"} & weights.parameters().keys():
                super().check(x, weights)

    with pytest.raises(ConformanceError, match="check with nf4 beside fp4 weights, which"):
        check_undeclared_weights(Silent())


def test_capabilities_tell_which_two_kinds() -> None:
    able = executors.get("grouped_nf4").capabilities
    assert able.takes("nf4", "nf4")
    assert able.takes("dense", "mxfp4")
    assert not able.takes("dense", "dense")
    assert not able.takes("nf4", "int4")
    dense = replace(able, weights=frozenset({"dense"}))
    assert dense.takes("dense", "dense")
    assert not dense.takes("dense", "nf4")
    assert not executors.get("native").capabilities.mixed
    assert PROBLEM.kinds == ("dense", "dense")
