"""docs/adding-an-executor.md, followed to the letter: its files written, its commands run, its outputs compared."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from adding import ROOT, Shell, blocks, commands, files, installed, plain, text
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_package_is_found_and_passes_the_suite(shell: Shell) -> None:
    assert set(plain(text("The package"))) <= set(plain(installed(shell)))
    suite, _ = commands("Turn the suite on it")
    told = shell.passes(suite)
    assert re.search(r"\d{2,} passed", told)
    said = [line for line in told.splitlines() if line.startswith("my_loop: ")]
    assert said == text("Turn the suite on it").splitlines()


@pytest.mark.nightly
def test_the_package_passes_compare(shell: Shell) -> None:
    installed(shell)
    _, compare = commands("Turn the suite on it")
    assert re.search(r"│ my_loop +│ pass ", shell.passes(compare))


@pytest.mark.nightly
def test_when_it_fails(shell: Shell) -> None:
    installed(shell)
    (diff,) = (block for block in blocks("When it fails") if block.language == "diff")
    removed, added = (line[1:] + "\n" for line in diff.text.splitlines())
    source = shell.folder / diff.title
    right = source.read_text()
    assert right.count(removed) == 1
    source.write_text(right.replace(removed, added))
    install, suite, own_test = commands("When it fails")
    shell.passes(install)

    failed = shell.run(suite)
    assert failed.returncode == pytest.ExitCode.TESTS_FAILED, failed.stdout
    message, problem = text("When it fails").splitlines()
    assert re.search(as_pattern(message), failed.stdout), failed.stdout
    shrunk = eval(problem, {"Problem": Problem, "MoEConfig": MoEConfig})  # the page leaves out what has its default
    assert repr(shrunk) in failed.stdout

    for file in files("When it fails"):
        shell.write(file)
    assert shell.run(own_test).returncode == pytest.ExitCode.TESTS_FAILED
    source.write_text(right)
    shell.passes(install)
    shell.passes(own_test)


def as_pattern(message: str) -> str:
    """The message with any figures in place of its own: another machine adds in another order."""
    figure = r"-?\d+\.\d+(e-\d+)?"
    return re.sub(figure, lambda _: figure, re.escape(message).replace(r"\-", "-").replace(r"\.", "."))


def test_an_option_is_checked_when_the_executor_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in files("The package"):
        Shell(tmp_path).write(file)
    monkeypatch.syspath_prepend(tmp_path / "my-moe")
    (block,) = blocks("Options")
    names: dict[str, type] = {}
    try:
        exec(block.text, names)
        assert names["MyBlockedLoop"](rows_at_once=64).name == "my_loop"
        with pytest.raises(ValueError, match=r"^rows_at_once=0: must be an integer of at least 1$"):
            names["MyBlockedLoop"](rows_at_once=0)
    finally:
        sys.modules.pop("my_moe", None)


def test_inside_this_repository_one_file_and_one_line_are_enough(shell: Shell) -> None:
    for package in ("executors", "moe_ref"):
        shutil.copytree(ROOT / package, shell.folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (line,) = blocks("Inside this repository")
    (executor,) = (file for file in files("The package") if file.language == "python")
    module, _, _ = line.text.strip().strip(",").split()[-1].strip('"').partition(":")
    shell.folder.joinpath(*module.split(".")).with_suffix(".py").write_text(executor.text)
    registry = shell.folder / line.title
    before, start, after = registry.read_text().partition("BUILT_IN = {\n")
    registry.write_text(before + start + line.text + after)
    assert "│ my_loop │ yes │ built-in │ dense │" in plain(shell.passes("python -m executors list"))
