"""What keeps the Triton kernels from overflowing in fp16 (E7)."""

import numpy as np
import pytest
import torch

import executors
from executors._triton import interpreter as _interpreter
from executors._triton import layer
from executors._triton.configs import FAMILIES
from executors._triton.device import INTERPRETED, Device
from executors._triton.launch import narrow as _narrow
from executors._triton.launch import products
from executors._triton.launch.grouping import group
from executors._triton.launch.operands import LaunchPlan
from moe_ref.conformance.judgement.call import run
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.judgement.ranges import check_range
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig
from triton_cases import DEVICE, inputs_of

LARGEST = 65504.0


def plan_for(ids: torch.Tensor, experts: int) -> LaunchPlan:
    if INTERPRETED:
        _interpreter.mend()
    config = FAMILIES["interpreter"].narrow[0]
    return LaunchPlan(
        group(ids, experts, config.up.block_m), ids.shape[1], config, Device("interpreter", 3), "ieee", True
    )


def values_of(rows: int, columns: int) -> torch.Tensor:
    """Of every size that fp32 has, row by row, and column by column."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(-20, 50, (rows, 1)) + rng.integers(-5, 6, (1, columns))
    return torch.from_numpy((rng.standard_normal((rows, columns)) * 2.0**sizes).astype(np.float32)).to(DEVICE)


def close(found: torch.Tensor, power: torch.Tensor, exact: torch.Tensor) -> None:
    """Rounded once to fp16's precision, or to a multiple of its smallest number; rows not scaled within the range."""
    assert found.isfinite().all()
    if power.shape[1] == 1:
        assert ((power == 1) == (exact.abs().amax(dim=1, keepdim=True) <= LARGEST)).all()
    else:
        assert (found.abs().amax(dim=0) >= 2**14).all()
    assert (power.log2() % 1 == 0).all()
    error = (found.double() * power - exact.double()).abs()
    assert (error <= 2.0**-11 * exact.abs().double().clamp(min=2.0**-14 * power.double())).all()


def test_rows_are_narrowed() -> None:
    plan = plan_for(torch.arange(37, device=DEVICE)[:, None] % 3, 3)
    values = values_of(37, 300)
    values[0], values[1], values[2] = LARGEST, LARGEST + 1, 0.0
    values[3] = 3e38
    narrow = _narrow.by_rows(values, torch.float16, plan)
    assert narrow.powers is not None
    close(narrow.values, narrow.powers[:, None], values)


def test_columns_are_narrowed() -> None:
    """Each expert's for themselves; one without rows has powers of 1."""
    ids = torch.tensor([0, 2, 2, 0, 2, 2, 2, 4], device=DEVICE).repeat(6)[:, None]
    plan = plan_for(ids, 5)
    values = values_of(len(ids), 70)
    narrow = _narrow.by_columns(values, torch.float16, plan)
    assert narrow.powers is not None
    offsets = plan.groups.group_offsets.tolist()
    for expert in range(5):
        own = slice(offsets[expert], offsets[expert + 1])
        if own.start == own.stop:
            assert (narrow.powers[expert] == 1).all()
        else:
            close(narrow.values[own], narrow.powers[expert][None], values[own])


def test_other_dtypes_are_not_touched() -> None:
    """Bf16 and fp32 stand between kernels as they are."""
    plan = plan_for(torch.zeros(4, 1, dtype=torch.int64, device=DEVICE), 1)
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.randn(4, 8, device=DEVICE).to(dtype)
        assert _narrow.between(dtype) == dtype
        assert _narrow.by_rows(rows, dtype, plan) == _narrow.by_columns(rows, dtype, plan) == (rows, None)
    assert _narrow.between(torch.float16) == torch.float32


@pytest.mark.parametrize("case", ["preactivations", "activations", "weighted outputs", "gradients of slots"])
def test_fp16_between_kernels_overflows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do without wider buffers."""
    triton = executors.get("triton")
    check_range(triton, case, "dense", DEVICE)
    for module in (products, layer):
        monkeypatch.setattr(module, "between", lambda dtype: dtype)
    with pytest.raises(ConformanceError, match="breaks E7"):
        check_range(triton, case, "dense", DEVICE)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_example_of_the_specification(recompute: bool) -> None:
    """E7: o is 69997, half of which is the result."""
    problem = Problem(1, 1, 1, 1, MoEConfig(1, scoring="sigmoid"), "float16")
    inputs = inputs_of(problem)
    with torch.no_grad():
        for leaf, value in ((inputs.x, 1.0), (inputs.router_logits, 0.0), (inputs.weights.down_proj, 7000.0)):
            assert leaf is not None
            leaf.fill_(value)
        inputs.weights.gate_up_proj.copy_(torch.tensor([[[10.0], [1.0]]]))
    found = run(executors.get("triton", recompute=recompute), inputs)
    assert found.tensors["y"].item() == 35008.0
    assert all(value.isfinite().all() for value in found.tensors.values())
