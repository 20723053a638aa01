"""The suite on the kernels as they are compiled for sm90: TMA, wgmma and what else sm80 does not have."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import settings

import executors
from executed_problems import FIXED, SM90, every_tile, tile_of
from executing import executing, fenced
from executors import Executor
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.exact import check_exact
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.ptx.executed import POISON
from moe_ref.conformance.ptx.launch import How

NIGHTLY = settings.get_current_profile_name() == "nightly"
PROBLEMS = FIXED | SM90
pytestmark = fenced
SOME = ["few, bf16, TMA", "many, bf16, TMA", "some, fp16", "many, bf16, scaled, adapters", "nf4, some, bf16, nested"]
RUN = [*PROBLEMS] if NIGHTLY else SOME


def executor_of(path: str) -> Executor:
    return executors.get("grouped_nf4", path=path) if path else executors.get("triton")


@pytest.mark.parametrize("name", RUN)
def test_fixed_problems(name: str) -> None:
    """Also that TMA and wgmma are taken where a problem is there for them."""
    problem, path = PROBLEMS[name]
    texts: set[str] = set()
    with executing(target="sm90") as ran:
        ran.spoil = lambda _, ptx: texts.add(ptx) or ptx
        check_problem(executor_of(path), problem)
    if name in SM90:
        found = {use for use in ("bulk.tensor.2d", "bulk.tensor.3d") if any(use in ptx for ptx in texts)}
        found |= {columns for ptx in texts for columns in re.findall(r"wgmma\.mma_async\S*m64n(\d+)", ptx)}
        assert found >= {"bulk.tensor.2d", "bulk.tensor.3d"}
        assert len(found) > 2
        assert "256" in found or "many, bf16" not in name


@pytest.mark.skipif(not NIGHTLY, reason="nightly")
def test_every_tile_is_taken() -> None:
    """The tiles of sm90 are those of its problems, by dtype, alignment, 4 bits and rows."""
    assert every_tile("sm90") <= {tile_of("sm90", *PROBLEMS[name]) for name in RUN}


@pytest.mark.parametrize("name", [*PROBLEMS] if NIGHTLY else ["few, bf16, TMA"])
def test_bits_depend_on_nothing_that_nobody_wrote(name: str) -> None:
    """Three bytes in registers and memory before they are written; the last program first; programs one by one."""
    problem, path = PROBLEMS[name]
    results = []
    for poison, how in ((POISON, How()), (0x00, How(reverse=True)), (0x3C, How(together=1))):
        with executing(how, poison, "sm90"):
            results.append(run(executor_of(path), to_torch(problem, build(problem))).tensors)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


@pytest.mark.skipif(not NIGHTLY, reason="nightly")
@pytest.mark.parametrize("name", [*SM90])
@pytest.mark.parametrize("how", [How(seed=0), How(contracts=True)])
def test_approximations_and_contractions(name: str, how: How) -> None:
    problem, path = PROBLEMS[name]
    with executing(how, target="sm90"):
        check_problem(executor_of(path), problem)


def test_tf32_is_taken_where_torch_allows_it() -> None:
    """A product of whole numbers is exact in TF32 too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with executing(target="sm90") as ran:
            texts: set[str] = set()
            ran.spoil = lambda _, ptx: texts.add(ptx) or ptx
            check_exact(executors.get("triton"), "small_integers", "float32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert any(".tf32" in ptx for ptx in texts)
