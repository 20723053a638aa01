"""The suite on the kernels as they are compiled for sm80: every kernel, tile, dtype and form of 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import executors
from executed_problems import FIXED, NIGHTLY_ONLY, every_tile, tile_of
from executing import executing
from executors import Executor
from moe_ref.conformance import profiles
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.exact import CASES, check_exact
from moe_ref.conformance.judgement.exact_decode import check_every_code
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.judgement.ranges import RANGES, check_range
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.strategies import problems_for
from moe_ref.conformance.ptx.executed import POISON
from moe_ref.conformance.ptx.launch import How

PROFILE = profiles.current()
NIGHTLY = settings.get_current_profile_name() == "nightly"
KERNELS = {
    *("route", "route_backward", "group", "count", "scan", "place", "up", "down", "combine", "inner", "outer", "dz"),
    *("input_weights", "sums", "narrow_rows", "narrow_columns", "decode"),
}
RUN = [name for name in FIXED if NIGHTLY or name not in NIGHTLY_ONLY]
SEEN: dict[str, set[str]] = {}  # kernels that ran, by problem


def executor_of(path: str) -> Executor:
    return executors.get("grouped_nf4", path=path) if path else executors.get("triton")


@pytest.mark.parametrize("name", RUN)
def test_fixed_problems(name: str) -> None:
    problem, path = FIXED[name]
    with executing() as ran:
        check_problem(executor_of(path), problem)
    SEEN[name] = {kernel.removesuffix("_kernel") for kernel, _ in ran.kernels}
    assert SEEN[name] <= KERNELS


def test_every_kernel_ran() -> None:
    if len(SEEN) < len(RUN):
        pytest.skip("only some problems ran")
    assert set().union(*SEEN.values()) == KERNELS


def test_every_tile_is_taken() -> None:
    """The tiles of sm80 are those of its problems, by dtype, alignment, 4 bits and rows."""
    taken = {tile_of("sm80", *FIXED[name]) for name in RUN}
    assert every_tile("sm80") <= taken


@pytest.mark.skipif(not NIGHTLY, reason="nightly")
@settings(PROFILE, max_examples=PROFILE.max_examples // 20)
@given(data=st.data())
def test_drawn_problems(data: st.DataObject) -> None:
    with executing():
        executor = executors.get("triton")
        check_problem(executor, data.draw(problems_for(executor), label="problem"))


@pytest.mark.parametrize("name", [*FIXED] if NIGHTLY else ["few, bf16", "nf4, odd, bf16"])
def test_bits_depend_on_nothing_that_nobody_wrote(name: str) -> None:
    """Three bytes in registers and memory before they are written; the last program first; programs one by one."""
    problem, path = FIXED[name]
    results = []
    for poison, how in ((POISON, How()), (0x00, How(reverse=True)), (0x3C, How(together=1))):
        with executing(how, poison):
            results.append(run(executor_of(path), to_torch(problem, build(problem))).tensors)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("name", [*FIXED] if NIGHTLY else ["some, bf16, transposed, geglu"])
def test_approximations_at_their_worst(name: str) -> None:
    """Exponentials and divisions off by as much as the ISA allows."""
    problem, path = FIXED[name]
    for seed in range(5 if NIGHTLY else 1):
        with executing(How(seed=seed)):
            check_problem(executor_of(path), problem)


@pytest.mark.parametrize("name", [*FIXED] if NIGHTLY else ["odd, fp32, down bias", "few, bf16"])
def test_contracted(name: str) -> None:
    """An assembler may make one fma of a product and a sum."""
    problem, path = FIXED[name]
    with executing(How(contracts=True)):
        check_problem(executor_of(path), problem)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"] if NIGHTLY else ["bfloat16"])
@pytest.mark.parametrize("case", CASES if NIGHTLY else ["clamp_at_equality", "long_sums"])
def test_exact_cases(case: str, dtype: str) -> None:
    with executing():
        lacking = check_exact(executors.get("triton"), case, dtype)
    if lacking:
        pytest.skip(lacking)


def forms() -> Iterator[tuple[str, str, str, str]]:
    """Of 4 bits: kind, nested statistics, dtype, path."""
    if not NIGHTLY:
        yield from (("fp4", "one", "float16", "fused"), ("mxfp4", "", "bfloat16", "decoded"))
        return
    for dtype, path in product(("float32", "bfloat16", "float16"), ("fused", "decoded")):
        yield from ((kind, nested, dtype, path) for kind in ("nf4", "fp4") for nested in ("", "one", "per expert"))
        yield "mxfp4", "", dtype, path


@pytest.mark.parametrize(("kind", "nested", "dtype", "path"), [*forms()])
def test_every_code(kind: str, nested: str, dtype: str, path: str) -> None:
    with executing():
        lacking = check_every_code(executor_of(path), kind, nested, dtype)
    assert not lacking


@pytest.mark.parametrize("case", RANGES if NIGHTLY else ["gates"])
def test_ranges(case: str) -> None:
    with executing():
        lacking = check_range(executors.get("triton"), case, "dense")
    if lacking:
        pytest.skip(lacking)


def test_tf32_is_taken_where_torch_allows_it() -> None:
    """A product of whole numbers is exact in TF32 too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with executing():
            check_exact(executors.get("triton"), "small_integers", "float32")
    finally:
        torch.set_float32_matmul_precision(before)
