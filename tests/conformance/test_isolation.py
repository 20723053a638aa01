"""``--isolate``: an executor that ends its process, or hangs, fails the tests that it does so in, and no others."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_ref.conformance.isolation.process import EndedError, StartError, TestProcess
from moe_ref.conformance.isolation.protocol import refusal
from moe_ref.conformance.problems import pinned
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.reporting import expected
from moe_ref.types import MoEConfig
from plugin_runs import install, run_pytest

CRASHING = """
import ctypes, time
import executors
from moe_ref.conformance.wrapped import Wrapped

def slots(inner, x, ids, w, weights):
    if ((ids < 0) | (ids >= weights.num_experts)).any() or not len(x):
        {ends}
    return inner.experts(x, topk_ids=ids, topk_weights=w, weights=weights)

def crashing():
    return Wrapped("crashing", executors.get("native"), slots=slots)
"""
SUITE = "--pyargs", "moe_ref.conformance.suite", "--executor", "crashing", "--hypothesis-profile", "quick", "--isolate"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    directory.mkdir()
    return directory


def crashes(problem: Problem) -> bool:
    ids = build(problem).topk_ids
    return problem.tokens == 0 or bool(((ids < 0) | (ids >= problem.experts)).any())


def judged(number: int) -> list[Problem]:
    """Dense pinned problems with this many tokens."""
    return [own for own in pinned.SMALL if own.tokens == number and {*own.kinds} == {"dense"}]


@pytest.mark.parametrize("tokens", [(0,), pytest.param((0, 9), marks=pytest.mark.nightly)])
def test_exactly_the_tests_that_crash_fail_and_show_their_problems(outside: Path, tokens: tuple[int, ...]) -> None:
    """Without tokens, and every night with ids of other experts."""
    install(outside, "crashing", "crashing:crashing", CRASHING.format(ends="ctypes.string_at(0)"))
    run = [problem for number in tokens for problem in judged(number)]
    wrong = [problem for problem in run if crashes(problem)]
    assert {problem.tokens for problem in wrong} == {*tokens}
    assert len(wrong) < len(run) or tokens == (0,)
    outside.joinpath("test_mine.py").write_text("def test_mine():\n    pass\n")
    ran = run_pytest(
        outside, *SUITE, "test_mine.py", "-k", f"mine or pinned and ({' or '.join(f'T{own}-' for own in tokens)})", "-q"
    )
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout + ran.stderr
    assert re.search(rf"^{len(wrong)} failed, {len(run) - len(wrong) + 1} passed", ran.stdout, re.MULTILINE)
    failures = ran.stdout.partition("= conformance =")[0]
    said = re.findall(r"^again: .*check_problem\(get\('crashing'\), (Problem.*)\)$", failures, re.MULTILINE)
    names = {"Problem": Problem, "MoEConfig": MoEConfig, "frozenset": frozenset}
    assert sorted((eval(own, names) for own in said), key=repr) == sorted(wrong, key=repr)
    assert failures.count("the process is ended by SIGSEGV") == len(wrong)
    assert failures.count("Fatal Python error: Segmentation fault") == len(wrong)
    assert "slots" in failures
    assert f"  ends the process (SIGSEGV): {len(wrong)} failure" in ran.stdout


@pytest.mark.nightly
def test_a_hang_and_an_exit_are_failures_too_and_may_be_expected(outside: Path) -> None:
    source = CRASHING.format(ends="time.sleep(1000) if len(x) else __import__('os')._exit(7)")
    install(outside, "crashing", "crashing:crashing", source)
    which = *SUITE, "-k", "pinned and (T0- or T9-)", "-q", "--isolate-limit", "20"
    ran = run_pytest(outside, *which)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert "  ends the process (exit): 1 failure\n    the process ends with status 7\n" in ran.stdout
    assert re.search(
        r"  ends the process \(hang\): \d+ failures?\n    the process says nothing for 20 s, and is", ran.stdout
    )
    entries = [{"raises": how, "test": "test_pinned*", "reason": f"issue {how}"} for how in ("exit", "hang")]
    known = {"format": expected.FORMAT, "executors": {"crashing": entries}}
    outside.joinpath("known.json").write_text(json.dumps(known))
    ran = run_pytest(outside, *which, "--expected-failures", "known.json")
    assert ran.returncode == 0, ran.stdout
    assert "  expected raises exit test_pinned*: 1 test; issue exit" in ran.stdout


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, ""),
        ({"numprocesses": 2}, "--isolate: must stand without -n: "),
        ({"tx": ["popen"]}, "--isolate: must stand without -n: "),
        ({"usepdb": True}, "--isolate: must stand without --pdb: "),
        ({"moe_ref_isolate_limit": 0.0}, "--isolate-limit 0: must be a number of seconds above 0"),
        ({"moe_ref_isolate_limit": math.nan}, "--isolate-limit nan: must be a number of seconds above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict[str, Any], says: str) -> None:
    option = SimpleNamespace(usepdb=False, moe_ref_isolate_limit=600.0, numprocesses=None, tx=[])
    vars(option).update(asked)
    config: Any = SimpleNamespace(option=option, getoption=lambda name: getattr(option, name))
    assert refusal(config).startswith(says) if says else not refusal(config)


def test_several_processes_are_refused_in_one_line(outside: Path) -> None:
    ran = run_pytest(outside, "--isolate", "-n", "2")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith("ERROR: --isolate: must stand without -n: ")


def test_a_process_that_does_not_start_is_told(tmp_path: Path) -> None:
    process = TestProcess([str(tmp_path / "nothing.py"), "-p", "no:cacheprovider"], 60.0)
    with pytest.raises(StartError, match=r"^the process of the tests ends .*: ERROR: file or directory not found"):
        process.run("nothing.py::test_a", "")
    process.close()


def test_a_process_is_used_until_it_ends(tmp_path: Path) -> None:
    """A child that it leaves behind, which keeps the pipe open, hides no end."""
    source = "\n".join(
        [
            "import os, signal, time",
            "def test_a():",
            "    print(os.getpid())",
            "def test_b():",
            "    if os.fork() == 0:",
            "        time.sleep(30)",
            "        os._exit(0)",
            "    os.kill(os.getpid(), signal.SIGKILL)",
        ]
    )
    tmp_path.joinpath("test_own.py").write_text(source)
    process = TestProcess([f"--rootdir={tmp_path}", "-p", "no:cacheprovider", str(tmp_path)], 60.0)

    def pid() -> str:
        call = next(report for report in process.run("test_own.py::test_a", "") if report["when"] == "call")
        assert call["outcome"] == "passed"
        return call["sections"][0][1]

    first = pid()
    assert pid() == first
    with pytest.raises(EndedError, match="is ended by SIGKILL") as caught:
        process.run("test_own.py::test_b", "")
    assert (caught.value.how, caught.value.judged) == ("SIGKILL", "")
    assert pid() != first
    process.close()
