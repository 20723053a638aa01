"""The kernels that read 4 bits, on both paths: decoding in the products and before them, judged as every executor is.

The formats are NF4 and FP4, plain and nested, and MXFP4. Interpreted kernels get fewer problems.
"""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import executors
from executors import Executor
from moe_ref import MoEConfig
from moe_ref.conformance import profiles
from moe_ref.conformance.judgement.checks import check_problem, check_repeatable
from moe_ref.conformance.judgement.errors import check_errors
from moe_ref.conformance.judgement.exact import CASES, check_exact
from moe_ref.conformance.judgement.exact_decode import check_every_code
from moe_ref.conformance.judgement.laws import LAWS, check_law
from moe_ref.conformance.judgement.ranges import RANGES, check_range
from moe_ref.conformance.judgement.second_derivatives import check_second_derivatives
from moe_ref.conformance.problems import pinned
from moe_ref.conformance.problems.declared import undeclared
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_NIGHT = profiles.current() is profiles.PROFILES["nightly"]
# A thousand rows take an interpreter a minute, in all forms.
EXACT = [case for case in CASES if DEVICE == "cuda" or EVERY_NIGHT or not case.startswith("plain_rows")]
PROFILE = profiles.current()
PATHS = {path: executors.get("grouped_nf4", path=path) for path in ("fused", "decoded")}
MOST = 10**6 if torch.cuda.is_available() else 40_000  # numbers of x and a projection, for the interpreter

both_paths = pytest.mark.parametrize("executor", PATHS.values(), ids=PATHS)

# These must not depend on chance: gpt-oss' form in both storage orders, every kind of statistics, rows within bytes.
GPT_OSS = replace(pinned.GPT_OSS, top_k=2)
BASE = Problem(17, 5, 64, 96, GPT_OSS, "bfloat16", gate_up_bias=True, down_bias=True)
ALWAYS = {
    "nf4": replace(BASE, quant_type="nf4"),
    "nested": replace(BASE, quant_type="nf4", nested="one", weights_layout="transposed", config=MoEConfig(2)),
    "per expert": replace(BASE, quant_type="nf4", nested="per expert", blocksize=32, dtype="float16"),
    "straddling": replace(BASE, quant_type="fp4", nested="one", hidden=50, intermediate=17, dtype="float32"),
    "rows of odd length": replace(
        BASE,
        quant_type="nf4",
        blocksize=32,
        hidden=17,
        intermediate=7,
        config=MoEConfig(2),
        weights_layout="transposed",
    ),
    "mxfp4": replace(BASE, quant_type="mxfp4", gate_up_rank=3, down_rank=17),
    "mxfp4, transposed": replace(
        BASE, quant_type="mxfp4", weights_layout="transposed", config=MoEConfig(2), dtype="float16"
    ),
    "empty experts and slots": replace(BASE, quant_type="nf4", experts=33, entry="experts", empty_slots=True),
    "broken rows": replace(BASE, quant_type="mxfp4", broken_logits=3, broken_x=1),
}


def small(executor: Executor) -> st.SearchStrategy[Problem]:
    """Problems within an executor's declared capabilities, of sizes that an interpreter gets through."""
    return problems_for(executor).filter(lambda p: p.experts * p.hidden * p.intermediate <= MOST)


def drawn(share: int) -> settings:
    """The profile with 1 / ``share`` of its examples."""
    return settings(PROFILE, max_examples=max(1, PROFILE.max_examples // share))


@both_paths
@pytest.mark.parametrize("name", ALWAYS)
def test_always(executor: Executor, name: str) -> None:
    check_problem(executor, ALWAYS[name], DEVICE)


@both_paths
@drawn(10)
@given(data=st.data())
def test_matches_specification(executor: Executor, data: st.DataObject) -> None:
    check_problem(executor, data.draw(small(executor), label="problem"), DEVICE)


@both_paths
@drawn(50)
@given(data=st.data())
def test_repeatable(executor: Executor, data: st.DataObject) -> None:
    check_repeatable(executor, data.draw(small(executor), label="problem"), DEVICE)


@pytest.mark.parametrize("law", LAWS if EVERY_NIGHT else [*LAWS][1::2])  # test_triton has the others
@drawn(50)
@given(data=st.data())
def test_laws(law: str, data: st.DataObject) -> None:
    executor = PATHS["fused"]
    assume(check_law(executor, data.draw(small(executor), label="problem"), law, DEVICE))


@both_paths
@pytest.mark.parametrize(("case", "kind"), list(zip(RANGES, cycle(("nf4", "mxfp4", "fp4")), strict=False)))
def test_ranges(executor: Executor, case: str, kind: str) -> None:
    """E7: each case in one format."""
    lacking = f"{executor.name} does not declare a norm after each expert" if RANGES[case].norm else ""
    assert check_range(executor, case, kind, DEVICE) == lacking


@both_paths
@pytest.mark.parametrize("problem", pinned.PACKED, ids=lambda p: f"T{p.tokens}-E{p.experts}-{p.dtype}-{p.quant_type}")
def test_pinned_problems(executor: Executor, problem: Problem) -> None:
    lacking = undeclared(problem, executor.capabilities)
    if problem.hidden * (problem.tokens + problem.intermediate) > MOST or lacking:
        pytest.skip(lacking or "too large for the interpreter")
    check_problem(executor, problem, DEVICE)


@pytest.mark.parametrize(
    ("path", "quant_type", "nested", "dtype"),
    [
        ("fused", "nf4", "per expert", "bfloat16"),
        *([("fused", "fp4", "one", "float16")] if EVERY_NIGHT else []),  # as compiled it runs in tests/ptx
        ("fused", "mxfp4", "", "float32"),
        ("decoded", "mxfp4", "", "bfloat16"),
    ],
)
def test_every_code(path: str, quant_type: str, nested: str, dtype: str) -> None:
    assert check_every_code(PATHS[path], quant_type, nested, dtype, DEVICE) == ""


@pytest.mark.parametrize("case", EXACT)
def test_exact_cases(case: str) -> None:
    assert check_exact(PATHS["fused"], case, "bfloat16", DEVICE) == ""


def test_refusals() -> None:
    check_errors(PATHS["fused"], DEVICE)
    check_second_derivatives(PATHS["fused"], DEVICE)
