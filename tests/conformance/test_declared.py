"""What executors may leave out of the specification: the suite keeps within it, says so, and judges the rest."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import executors
from declared_words import PLAIN, WORDS, Word
from executors import Capabilities, Unsupported
from moe_ref.conformance.judgement.checks import ConformanceError, check_problem
from moe_ref.conformance.problems import pinned
from moe_ref.conformance.problems.declared import fitted, in_declared_dtype, undeclared, without_undeclared
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import WEIGHTS, problems
from moe_ref.conformance.reporting.applicable import lacks
from moe_ref.conformance.wrapped import Declaring
from moe_ref.types import GateUpLayout, MoEConfig
from moe_ref.validation.nf4 import BLOCKSIZES

SUPPORT = Path(__file__).parents[1] / "support"
ALL = Capabilities(post_expert_norm=True, weights=frozenset(WEIGHTS), mixed=True)
PROBLEM = Problem(33, 5, 32, 48, MoEConfig(2), "bfloat16", entry="experts", gate_up_bias=True, seed=1)
NEW = [field.name for field in fields(Capabilities) if field.kw_only]
DRAWN = settings(max_examples=200, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

declarations = st.fixed_dictionaries(
    {
        "alphas": st.sampled_from([None, frozenset({1.0}), frozenset({1.702})]),
        "limits": st.sampled_from([None, frozenset({None}), frozenset({7.0}), frozenset({None, 7.0})]),
        "up_offsets": st.sampled_from([None, frozenset({0.0}), frozenset({1.0})]),
        "gate_up_layouts": st.sampled_from([frozenset({name}) for name in GateUpLayout.__args__]),
        "biases": st.booleans(),
        "bias_dtypes": st.sampled_from([frozenset({"x"}), frozenset({"float32"}), frozenset({"bfloat16", "x"})]),
        "router_logits_dtypes": st.sampled_from([frozenset({"x"}), frozenset({"float32"})]),
        "topk_weights_dtypes": st.sampled_from([frozenset({"x"}), frozenset({"float32"})]),
        "topk_ids_dtypes": st.sampled_from([frozenset({"int32"}), frozenset({"int64"})]),
        "lora_dtypes": st.sampled_from([frozenset({"x"}), frozenset({"float32"})]),
        "strided": st.frozensets(st.sampled_from(["x", "routing", "weights"])),
        "align_hidden": st.sampled_from([1, 8, 16, 24]),
        "align_intermediate": st.sampled_from([1, 8, 16, 24]),
        "empty_batch": st.booleans(),
        "empty_slots": st.booleans(),
        "duplicate_ids": st.booleans(),
        "blocksizes": st.frozensets(st.sampled_from(BLOCKSIZES), min_size=1),
        "nested": st.frozensets(st.sampled_from(["one", "per expert"])),
        "late_clamp": st.booleans(),
        "softcap": st.booleans(),
        "post_expert_norm": st.booleans(),
        "routing": st.booleans(),
    }
)


def everything(routing: bool = True) -> st.SearchStrategy:  # type: ignore[type-arg]
    return problems(weights=WEIGHTS, mixed=True, routing=routing)


@DRAWN
@given(data=st.data())
def test_what_is_drawn_is_declared(data: st.DataObject) -> None:
    able = replace(ALL, **data.draw(declarations))
    problem = data.draw(everything(able.routing))
    assert undeclared(without_undeclared(problem, able), able) == ""


@DRAWN
@given(problem=everything())
def test_who_declares_all_is_judged_on_all(problem) -> None:  # type: ignore[no-untyped-def]
    """Executors that were written before these words get the problems that they got."""
    assert without_undeclared(problem, ALL) == fitted(problem, ALL) == problem
    assert undeclared(problem, ALL) == ""


def test_pinned_problems_stay_for_who_declares_all() -> None:
    assert [fitted(problem, ALL) for problem in pinned.ALL] == list(pinned.ALL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pinned_problems_are_those_of_one_dtype_too(dtype: str) -> None:
    """Those past fp16's range stay what they are."""
    able = replace(ALL, dtypes=frozenset({dtype}))
    forms = [fitted(in_declared_dtype(problem, able), able) for problem in pinned.ALL]
    assert {form.dtype for form in forms if not form.powers} == {dtype}
    left_out = [problem for problem, form in zip(pinned.ALL, forms, strict=True) if undeclared(form, able)]
    assert left_out == [problem for problem in pinned.ALL if problem.powers and problem.dtype != dtype]


def test_every_word_has_an_executor_that_gets_it_wrong() -> None:
    less = {name for word in WORDS.values() for name in word.less}
    assert less >= {*NEW}
    assert Capabilities().blocksizes == {*BLOCKSIZES}
    assert Capabilities().gate_up_layouts == {*GateUpLayout.__args__}


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_a_declared_word_that_is_wrong_is_rejected(word: Word) -> None:
    with pytest.raises(word.raises or ConformanceError):
        check_problem(word.executor(less=False), word.problem)


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_a_word_that_is_not_declared_is_not_judged(word: Word) -> None:
    wrong, right = word.executor(less=True), word.executor(less=True, wrong=False)
    assert undeclared(word.problem, wrong.capabilities)
    for executor in (wrong, right):
        check_problem(executor, without_undeclared(word.problem, executor.capabilities))
    with pytest.raises(Unsupported, match=r"^\S.*: must be .* for right$"):
        check_problem(right, word.problem)
    more = len(lacks(wrong.capabilities)) - len(lacks(word.executor(less=False).capabilities))
    assert more >= len(word.less) - ("routing" in word.less and len(word.less) > 1)


CONFTEST = """
import json, os, sys
sys.path.insert(0, {support!r})
import executors
from declared_words import PLAIN, WORDS
from executors import Unsupported
from moe_ref.conformance.wrapped import Declaring

class Counting:
    def __init__(self, inner):
        self.inner, self.name, self.capabilities = inner, inner.name, inner.capabilities

    def counted(self, method, *given, **named):
        try:
            return method(*given, **named)
        except Unsupported as error:
            with open({log!r}, "a") as log:
                log.write(json.dumps([os.environ["PYTEST_CURRENT_TEST"], str(error)]) + "\\n")
            raise

    def __call__(self, *given):
        return self.counted(self.inner, *given)

    def experts(self, *given, **named):
        return self.counted(self.inner.experts, *given, **named)

    def check(self, *given):
        return self.counted(self.inner.check, *given)

executors.register("judged", lambda: Counting({made}))
"""


def run_suite(folder: Path, made: str, *options: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Turns the whole suite, profile quick, on an executor; also what Unsupported it raised, and in which test."""
    log = folder / "unsupported.jsonl"
    (folder / "conftest.py").write_text(CONFTEST.format(support=str(SUPPORT), log=str(log), made=made))
    (folder / "test_all.py").write_text("from moe_ref.conformance.suite import *\n")
    command = [sys.executable, "-m", "pytest", "-q", "--executor", "judged", "--hypothesis-profile", "quick", *options]
    ran = subprocess.run([*command, "test_all.py"], cwd=folder, capture_output=True, text=True, check=False)
    raised = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return ran, [own for own in raised if "test_undeclared_weights_are_refused" not in own[0]]


def test_a_kernel_for_plain_swiglu_is_judged_without_a_refusal(tmp_path: Path) -> None:
    """And what it does not declare is told: the summary has a line for each."""
    made = 'Declaring("judged", executors.get("native"), declared=PLAIN)'
    ran, raised = run_suite(tmp_path, made)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert raised == []
    for says in (
        "no alpha",
        "no limit",
        "no offset of ups",
        "no biases",
        "H in multiples of 16 alone",
        "I in multiples of 16 alone",
        "at least one token",
        "contiguous x, routing, weights alone",
        "no empty slots and no duplicate ids in a row; clause R7 is not applicable",
        "gate and up concatenated alone",
        "topk_ids in int64 alone",
        "topk_weights in float32 alone",
    ):
        assert f"judged: {says}" in ran.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("name", WORDS)
def test_the_whole_suite_keeps_within_each_word(name: str, tmp_path: Path) -> None:
    """An executor that is wrong beyond its declaration passes, and is never called beyond it."""
    ran, raised = run_suite(tmp_path, f"WORDS[{name!r}].executor(less=True)")
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert raised == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", WORDS)
def test_the_whole_suite_judges_each_word(name: str, tmp_path: Path) -> None:
    ran, _ = run_suite(tmp_path, f"WORDS[{name!r}].executor(less=False)", "-x")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout[-3000:]


def test_a_plain_kernel_that_is_wrong_is_rejected() -> None:
    """The declaration leaves enough: one percent more, and the last token dropped."""
    from moe_ref.conformance.mutants.outputs import one_percent_more, token_dropped

    for change in (one_percent_more, token_dropped):
        wrong = Declaring("wrong", executors.get("native"), slots=change, declared=PLAIN)
        with pytest.raises(ConformanceError):
            check_problem(wrong, without_undeclared(PROBLEM, PLAIN))
