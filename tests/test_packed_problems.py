"""Problems with 4-bit weights are what they say, and laws look at them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import executors
from executors import Executor
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.build import build
from moe_ref.conformance.checks import ConformanceError
from moe_ref.conformance.laws import check_law
from moe_ref.conformance.packed import decoded, of_experts, with_own_blocks
from moe_ref.conformance.problem import Problem
from moe_ref.conformance.wrapped import Wrapped, experts
from moe_ref.nf4 import decode

PROBLEM = Problem(9, 4, 32, 16, MoEConfig(2), quant_type="nf4", blocksize=32, entry="experts")


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


def test_experts_change_places() -> None:
    """With their bytes and scales; -1 is an expert of NaN."""
    for nested in ("", "one", "per expert"):
        weights = build(replace(PROBLEM, nested=nested)).weights
        before = decoded(weights)
        after = decoded(of_experts(weights, np.array([2, 0, 3, 1, -1])))
        for name in ("gate_up_proj", "down_proj"):
            moved = getattr(after, name)
            assert (moved[:4] == getattr(before, name)[[2, 0, 3, 1]]).all()
            assert np.isnan(moved[4]).any()


def test_no_block_straddles_experts_that_change_places() -> None:
    problem = with_own_blocks(replace(PROBLEM, hidden=7, intermediate=5, blocksize=4096))
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
@pytest.mark.parametrize("nested", ["", "one", "per expert"])
def test_laws_of_experts_look_at_4_bits(law: str, breaker, nested: str) -> None:  # type: ignore[no-untyped-def]
    executor, problem = executors.get("grouped_nf4"), replace(PROBLEM, nested=nested)
    assert check_law(executor, problem, law)
    with pytest.raises(ConformanceError):
        check_law(Wrapped("broken", executor, slots=breaker), problem, law)
