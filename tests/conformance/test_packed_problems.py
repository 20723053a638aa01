"""Problems with 4-bit weights are as described, and laws apply to them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, find, settings
from hypothesis.errors import NoSuchExample
from torch import Tensor

import executors
from executors import Capabilities, Executor
from executors.grouped_nf4 import GroupedNF4
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.judgement.errors import check_errors
from moe_ref.conformance.judgement.exact import check_exact
from moe_ref.conformance.judgement.exact_decode import WINDOWS, check_every_code
from moe_ref.conformance.judgement.laws import check_law
from moe_ref.conformance.judgement.second_derivatives import check_second_derivatives
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.packed import decoded, in_whole_blocks, of_experts, with_own_blocks
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems
from moe_ref.conformance.wrapped import Wrapped, experts
from moe_ref.nf4 import NF4_CODE, unpack
from moe_ref.packed import decode

PROBLEM = Problem(9, 4, 32, 16, MoEConfig(2), quant_type="nf4", blocksize=32, entry="experts")


@dataclass(frozen=True)
class OnlyMXFP4(GroupedNF4):
    name: ClassVar[str] = "only_mxfp4"
    capabilities: ClassVar[Capabilities] = replace(GroupedNF4().capabilities, weights=frozenset({"mxfp4"}))


@dataclass(frozen=True)
class OnlySwiGLU(GroupedNF4):
    name: ClassVar[str] = "only_swiglu"
    capabilities: ClassVar[Capabilities] = replace(GroupedNF4().capabilities, activations=frozenset({"swiglu"}))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("nested", "segments"), [("", None), ("one", ()), ("per expert", (4,))])
def test_weights_have_the_form_that_is_asked_for(
    nested: str, segments: tuple[int, ...] | None, quant_type: str, layout: str
) -> None:
    problem = replace(PROBLEM, nested=nested, quant_type=quant_type, weights_layout=layout)
    weights, dense = build(problem).weights, build(replace(problem, quant_type="")).weights
    assert set(weights.packed()) == {"gate_up_proj", "down_proj"}
    for name, tensor in weights.packed().items():
        assert (tensor.quant_type, tensor.blocksize, tensor.transposed) == (quant_type, 32, layout == "transposed")
        assert (None if tensor.nested_offset is None else tensor.nested_offset.shape) == segments
        assert tensor.absmax.dtype == (np.uint8 if nested else np.float32)
        original = getattr(dense, name)
        assert np.abs(decode(tensor) - original).mean() < 0.2 * np.abs(original).mean()


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_weights_in_mxfp4_have_the_form_that_is_asked_for(layout: str) -> None:
    problem = replace(PROBLEM, quant_type="mxfp4", intermediate=64, weights_layout=layout, dtype="float16")
    weights, dense = build(problem).weights, build(replace(problem, quant_type="")).weights
    for name, tensor in weights.packed().items():
        assert (tensor.quant_type, tensor.dtype, tensor.transposed) == ("mxfp4", "float16", layout == "transposed")
        original = getattr(dense, name)
        assert np.abs(decode(tensor) - original).mean() < 0.2 * np.abs(original).mean()


def test_problems_in_mxfp4_have_whole_blocks() -> None:
    """Widths are rounded up; fields of other formats keep their defaults."""
    quick = settings(database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    found = find(problems(weights=("mxfp4",)), lambda p: p.weights_layout == "transposed", settings=quick)
    assert found == Problem(
        0, 1, 32, 32, MoEConfig(1, scoring="softmax"), quant_type="mxfp4", weights_layout="transposed"
    )
    drawn = replace(PROBLEM, hidden=7, intermediate=33)
    assert in_whole_blocks(drawn) == drawn
    whole = in_whole_blocks(replace(drawn, quant_type="mxfp4"))
    assert (whole.hidden, whole.intermediate) == (32, 64)


QUICK = settings(database=None, derandomize=True, max_examples=2000, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kinds", [("dense", "nf4"), ("mxfp4", "dense"), ("fp4", "nf4"), ("nf4", "mxfp4")])
def test_layers_of_two_kinds_are_drawn(kinds: tuple[str, str]) -> None:
    """For who declares them; what is dense keeps its numbers, and what is in 4 bits has the others'."""
    found = find(problems(weights=("nf4", "fp4", "mxfp4"), mixed=True), lambda p: p.kinds == kinds, settings=QUICK)
    assert eval(repr(found), {"Problem": Problem, "MoEConfig": MoEConfig}) == found
    weights, dense = build(found).weights, build(replace(found, quant_type="", down_quant_type=None)).weights
    for name, kind in zip(("gate_up_proj", "down_proj"), kinds, strict=True):
        own = getattr(weights, name)
        assert (own == getattr(dense, name)).all() if kind == "dense" else own.quant_type == kind
    if "mxfp4" in kinds:
        assert found.hidden % 32 == found.intermediate % 32 == 0


def test_who_does_not_declare_two_kinds_gets_none() -> None:
    every = problems(weights=("dense", "nf4", "fp4", "mxfp4"))
    with pytest.raises(NoSuchExample):
        find(every, lambda p: p.kinds[0] != p.kinds[1], settings=settings(QUICK, max_examples=300))
    packed = problems(weights=("nf4", "mxfp4"), mixed=True)
    with pytest.raises(NoSuchExample):
        find(packed, lambda p: p.kinds == ("dense", "dense"), settings=settings(QUICK, max_examples=300))


def test_an_executor_may_take_nothing_but_mxfp4() -> None:
    """MXFP4 holds whole numbers and every code; sizes are rounded up to whole blocks; bad input has valid widths."""
    only = OnlyMXFP4()
    assert check_exact(only, "small_integers", "bfloat16") == ""
    assert check_exact(only, "long_sums", "bfloat16") == ""
    assert check_every_code(only, "mxfp4", "", "float16") == ""
    assert check_every_code(only, "nf4", "", "float16") == "only_mxfp4 does not declare nf4 weights"
    check_errors(only)
    check_second_derivatives(only)
    assert {"absmax_in_bf16", "nibbles_swapped", "exponent_bias_128"} & mutants(only).keys() == {
        "nibbles_swapped",
        "exponent_bias_128",
    }


def test_experts_change_places() -> None:
    """Experts move with their bytes and scales; -1 is an expert of NaN."""
    forms = [{"nested": nested} for nested in ("", "one", "per expert")]
    mixed = {"quant_type": "", "down_quant_type": "mxfp4", "intermediate": 32}
    for form in (*forms, {"quant_type": "mxfp4", "intermediate": 32}, mixed):
        weights = build(replace(PROBLEM, **form)).weights
        before = decoded(weights)
        after = decoded(of_experts(weights, np.array([2, 0, 3, 1, -1])))
        for name in ("gate_up_proj", "down_proj"):
            moved = getattr(after, name)
            assert (moved[:4] == getattr(before, name)[[2, 0, 3, 1]]).all()
            assert np.isnan(moved[4]).any()


def test_exponents_without_a_test_are_three() -> None:
    """The exponents of 2**126 and 2**127, whose largest codes are infinite, and that of NaN."""
    shown = {exponent for _, window in WINDOWS for exponent in window}
    assert set(range(256)) - shown == {253, 254, 255}


def test_no_block_straddles_experts_that_change_places() -> None:
    problem = with_own_blocks(replace(PROBLEM, hidden=7, intermediate=5, blocksize=4096), Capabilities())
    for tensor in build(problem).weights.packed().values():
        assert tensor.size // tensor.shape[0] % tensor.blocksize == 0


def reads_the_last_expert(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    last = decode(weights.down_proj)[-1].sum().to(x)
    return experts(inner, x, ids, w, weights) + 0 * last


def prefers_the_first_expert(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, x, ids, torch.where(ids == 0, 2 * w, w), weights)


@pytest.mark.parametrize(
    ("law", "breaker"), [("append_expert", reads_the_last_expert), ("relabel_experts", prefers_the_first_expert)]
)
@pytest.mark.parametrize(
    "form",
    [{"nested": nested} for nested in ("", "one", "per expert")] + [{"quant_type": "mxfp4", "intermediate": 32}],
    ids=str,
)
def test_laws_of_experts_look_at_4_bits(law: str, breaker, form: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    executor, problem = executors.get("grouped_nf4"), replace(PROBLEM, **form)
    assert check_law(executor, problem, law)
    with pytest.raises(ConformanceError):
        check_law(Wrapped("broken", executor, slots=breaker), problem, law)


@pytest.mark.parametrize(
    ("quant_type", "nested", "wrong"),
    [
        ("nf4", "per expert", "decoded_in_fp32"),
        ("nf4", "one", "nested_scales_fused"),
        ("mxfp4", "", "exponent_0_is_zero"),
    ],
)
def test_every_code_is_seen_without_squared_relu(quant_type: str, nested: str, wrong: str) -> None:
    only = OnlySwiGLU(path="torch")
    dtype = "float32" if wrong == "nested_scales_fused" else "bfloat16"
    assert check_every_code(only, quant_type, nested, dtype) == ""
    with pytest.raises(ConformanceError, match="every code"):
        check_every_code(mutants(only)[wrong], quant_type, nested, dtype)


def scales_by_row(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Rows longer than a block count blocks from their own beginning: element j has scale j // b of the row."""
    dense = {}
    for name, tensor in weights.packed().items():
        n, b = tensor.stored_shape[-1], tensor.blocksize
        rows, columns = torch.arange(tensor.size // n)[:, None], torch.arange(n)
        places = rows * (n // b) + columns // b if n > b else (rows * n + columns) // b
        scales = tensor.absmax[places]
        codes = unpack(tensor.codes.flatten(), tensor.size).reshape(-1, n).long()
        found = (torch.tensor(NF4_CODE)[codes] * scales).reshape(tensor.stored_shape).to(x.dtype)
        dense[name] = found.mT if tensor.transposed else found
    return experts(executors.get("native"), x, ids, w, weights.with_parameters(dense))


def test_every_code_sees_rows_that_end_within_a_block() -> None:
    """Q2: bitsandbytes 0.50.2 on a CPU (docs/findings.md, 7), whose rows that are whole blocks are right."""
    for only in (GroupedNF4(path="torch"), OnlySwiGLU(path="torch")):
        wrong = Wrapped("scales_by_row", only, slots=scales_by_row)
        with pytest.raises(ConformanceError, match=r"every code(.|\n)*hidden=96"):
            check_every_code(wrong, "nf4", "", "float32")
