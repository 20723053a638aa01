"""TF32: operands are rounded to nearest in the kernels, so that no result shrinks (ADR 14). Needs no GPU."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import executors
from executors._triton import operator as _operator
from executors._triton.device import Device
from executors._triton.inspect.rounding import unrounded_operands
from executors._triton.kernels.precision import rounded
from moe_ref.conformance.judgement.call import Result, run
from moe_ref.conformance.problems.problem import Problem
from triton_cases import ALIGNED, inputs_of, interpreted

LARGEST_GAIN = 5e-4  # rounding gives at most 3e-4 in results of few numbers; truncation from -1e-3 to -4e-3
STEP = 2.0**-10  # between neighbours in TF32, from 1 to 2

DENSE = replace(ALIGNED, dtype="float32", tokens=24)
ADAPTERS = replace(DENSE, gate_up_rank=4, down_rank=4)
NF4 = replace(DENSE, tokens=12, hidden=64, quant_type="nf4", blocksize=64)


@pytest.fixture
def allowed() -> Iterator[None]:
    """TF32 by torch's own setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@interpreted
@pytest.mark.usefixtures("new_kernels")
def test_operands_are_rounded_to_nearest() -> None:
    @triton.jit
    def kernel(values, out, precision: tl.constexpr, size: tl.constexpr):
        places = tl.arange(0, size)
        tl.store(out + places, rounded(tl.load(values + places), precision))

    given = {
        1 + 0.49 * STEP: 1.0,
        1 + 0.51 * STEP: 1 + STEP,
        1 + 0.5 * STEP: 1 + STEP,  # ties away from zero
        -1 - 0.5 * STEP: -1 - STEP,
        1 + 1.5 * STEP: 1 + 2 * STEP,
        2 - 0.5 * STEP: 2.0,
        0.0: 0.0,
        2.0**-149: 0.0,  # subnormals have the same last bit
        torch.finfo(torch.float32).max: float("inf"),
        float("inf"): float("inf"),
        -float("inf"): -float("inf"),
    }
    nans = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF]  # also those whose payload rounding would carry away
    bits = torch.tensor(nans, dtype=torch.int32)
    values = torch.cat([torch.tensor(list(given)), bits.view(torch.float32)])
    out = torch.empty_like(values)
    kernel[(1,)](values, out, "tf32", 16)
    assert out[: len(given)].tolist() == list(given.values())
    assert out[len(given) :].isnan().all()
    kernel[(1,)](values, out, "ieee", 16)
    assert torch.equal(out.view(torch.int32), values.view(torch.int32))


@interpreted
@pytest.mark.parametrize("problem", [DENSE, ADAPTERS, NF4], ids=["dense", "adapters", "nf4"])
def test_no_result_shrinks(problem: Problem, allowed: None) -> None:
    """The error is that of TF32, and its mean is none: truncated operands shrink every product."""
    found = run(executors.get("triton"), inputs_of(problem))
    torch.set_float32_matmul_precision("highest")
    exact = run(executors.get("triton"), inputs_of(problem))
    for name in sorted(products_of(exact)):
        value, error = exact.numpy(name), found.numpy(name) - exact.numpy(name)
        size = np.sqrt((error * error).sum() / (value * value).sum())
        assert 2.0**-13 < size < 2.0**-9, f"{name}: relative error {size:.1e}"
        gain = (error * value).sum() / (value * value).sum()
        assert abs(gain) < LARGEST_GAIN, f"{name}: gain {gain:+.1e}"


def products_of(result: Result) -> set[str]:
    """The results that come from products of matrices."""
    return {name for name in result.tensors if "bias" not in name and name not in ("topk_ids", "topk_weights")}


def test_unrounded_operands_are_found() -> None:
    """As Triton writes a kernel down; here one operand of the second product is not rounded."""
    text = """
    %cst = arith.constant dense<-8192> : tensor<16x16xi32>
    %0 = arith.andi %bits, %cst : tensor<16x16xi32>
    %a = tt.bitcast %0 : tensor<16x16xi32> -> tensor<16x16xf32>
    %t = tt.trans %a {order = array<i32: 1, 0>} : tensor<16x16xf32> -> tensor<16x16xf32>
    %1 = tt.dot %a, %t, %acc, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
    %b = tt.load %p : tensor<16x16x!tt.ptr<f32>>
    %2 = tt.dot %t, %b, %1, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
    %3 = tt.dot %b, %b, %2 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
    %4 = tt.dot %c, %c, %3, inputPrecision = tf32 : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32>
"""
    assert unrounded_operands(text) == 1
    assert unrounded_operands(text.replace("-8192", "-4096")) == 4


def test_older_gpus_have_no_tf32(allowed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton multiplies in fp32 there, so rounded operands would lose digits for nothing."""
    layer = type("Layer", (), {"x": torch.empty(1)})
    for family, precision in (("sm75", "ieee"), ("sm80", "tf32"), ("gfx942", "tf32")):
        monkeypatch.setattr(_operator, "device_of", lambda _, family=family: Device(family, 1))
        assert _operator.precision_of(layer) == precision
