"""docs/adding-an-executor.md, followed to the letter: its files written, its commands run, its outputs compared."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-an-executor.md"
BLOCK = re.compile(r"(?:^\*\*(?P<title>[^*\n]+)\*\*\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
OFFLINE = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation")


class Block(NamedTuple):
    title: str
    language: str
    text: str


class Shell:
    """Runs the page's command lines in a folder of its own, with what they install."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        program, *arguments = shlex.split(line)
        command = [sys.executable, *(() if program == "python" else ("-m", program)), *arguments]
        if line.startswith("pip install "):
            command += [*OFFLINE, "--upgrade", "--target", str(self.site)]
        path = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            command,
            cwd=self.folder,
            env=kept | {"PYTHONPATH": os.pathsep.join(path), "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def passes(self, line: str) -> str:
        """What a command prints that must succeed."""
        ran = self.run(line)
        assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    def write(self, block: Block) -> Path:
        path = self.folder / block.title
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text)
        return path


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def blocks(section: str) -> list[Block]:
    """The fenced blocks under a heading, each with the file's name that stands before it."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return [Block(m["title"] or "", m["language"], m["text"]) for m in BLOCK.finditer(text)]


def files(section: str) -> Iterator[Block]:
    return (block for block in blocks(section) if "/" in block.title and block.language != "diff")


def commands(section: str) -> list[str]:
    return [line for block in blocks(section) if block.language == "sh" for line in block.text.splitlines()]


def text(section: str) -> str:
    (shown,) = (block.text for block in blocks(section) if block.language == "text")
    return shown


def plain(output: str) -> list[str]:
    """Lines, with runs of spaces as one."""
    return [" ".join(line.split()) for line in output.splitlines()]


def installed(shell: Shell) -> str:
    """Follows "The package": writes its files and runs its commands; returns what the last one prints."""
    for file in files("The package"):
        shell.write(file)
    return [shell.passes(line) for line in commands("The package")][-1]


def test_the_package_is_found_and_passes_the_suite(shell: Shell) -> None:
    assert set(plain(text("The package"))) <= set(plain(installed(shell)))
    suite, _ = commands("Turn the suite on it")
    told = shell.passes(suite)
    assert re.search(r"\d{2,} passed", told)
    said = [line for line in told.splitlines() if line.startswith("my_loop: ")]
    assert said == text("Turn the suite on it").splitlines()


def test_the_package_passes_compare(shell: Shell) -> None:
    installed(shell)
    _, compare = commands("Turn the suite on it")
    assert re.search(r"│ my_loop +│ pass ", shell.passes(compare))


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
    assert "│ my_loop │ yes │ built-in │ dense │ │" in plain(shell.passes("python -m executors list"))
