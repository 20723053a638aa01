"""docs/porting.md, followed to the letter, with the package that docs/adding-an-executor.md builds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import adding
from adding import BLOCK, Block, Shell
from moe_ref.conformance import profiles
from moe_ref.conformance.reporting.expected import read_expected

PAGE = Path(__file__).parents[2] / "docs" / "porting.md"


def blocks(language: str) -> list[Block]:
    found = (Block(m["title"] or "", m["language"], m["text"]) for m in BLOCK.finditer(PAGE.read_text()))
    return [block for block in found if block.language == language]


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.text.splitlines()]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """The package of the other page, and this page's files beside it."""
    shell = Shell(tmp_path_factory.mktemp("porting"))
    adding.installed(shell)
    for block in (*blocks("python"), *blocks("json"), *blocks("yaml")):
        shell.write(block)
    return shell


def plant(shell: Shell, place: int) -> Iterator[None]:
    """One of the page's bugs, and back."""
    diff = blocks("diff")[place]
    removed, added = (line[1:] + "\n" for line in diff.text.splitlines())
    source = shell.folder / diff.title
    right = source.read_text()
    assert right.count(removed) == 1
    source.write_text(right.replace(removed, added))
    yield
    source.write_text(right)
    shell.passes("pip install ./my-moe")


def test_a_failure_is_told_saved_and_then_expected(shell: Shell) -> None:
    vectors, _quick, _little, _gpu, install, failing, expecting, *_ = commands()
    assert "249 cases" in shell.passes(vectors)
    for _ in plant(shell, 0):
        shell.passes(install)
        failed = shell.run(failing)
        assert failed.returncode == pytest.ExitCode.TESTS_FAILED
        *_declared, told, met, _crash = (block.text for block in blocks("text"))
        assert told in failed.stdout
        (folder,) = re.findall(r"saved: (.*)", told)
        assert (shell.folder / folder / "manifest.json").exists()
        assert met in shell.passes(expecting)


@pytest.mark.nightly
def test_a_crash_is_one_failure(shell: Shell) -> None:
    install, crashing = commands()[-2:]
    for _ in plant(shell, 1):
        shell.passes(install)
        failed = shell.run(crashing)
        assert failed.returncode == pytest.ExitCode.TESTS_FAILED
        assert blocks("text")[-1].text in failed.stdout
        assert re.search(r"^1 failed, \d+ passed", failed.stdout, re.MULTILINE)


@pytest.mark.nightly
def test_the_quick_profile_passes(shell: Shell) -> None:
    assert re.search(r"my_loop: \d+ clauses hold, 16 not applicable", shell.passes(commands()[1]))


def test_kernels_that_declare_little_are_judged_on_that(shell: Shell) -> None:
    """Of the run that the page has, the exact cases: they take seconds."""
    judged, refused = commands()[2:4]
    ran = shell.passes(f"{judged} -k exact_cases")
    for own in blocks("text")[:2]:
        assert own.text in ran
    assert "my_plain: no alpha; that part of E1 is not applicable" in ran
    ran = shell.run(refused)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert blocks("text")[2].text.strip() in ran.stderr


@pytest.mark.nightly
def test_kernels_that_declare_little_pass(shell: Shell) -> None:
    shell.passes(commands()[2])


@pytest.mark.nightly
def test_an_expected_failure_that_holds_fails_the_run(shell: Shell) -> None:
    ran = shell.run(commands()[6].replace("--hypothesis-profile quick", "--hypothesis-profile ci"))
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert "  expected C1 y bfloat16: holds now, so take it out of the file" in ran.stdout
    assert "failed" not in ran.stdout.splitlines()[-1]


def test_the_files_for_ci_say_what_the_page_says(shell: Shell) -> None:
    own = {block.title.partition("/")[2]: yaml.safe_load(block.text) for block in blocks("yaml")}
    steps = own[".github/workflows/conformance.yml"]["jobs"]["suite"]["steps"]
    (hook,) = own[".pre-commit-config.yaml"]["repos"][0]["hooks"]
    (suite,) = (step["run"] for step in steps if step.get("run", "").startswith("pytest"))
    for line in (suite, hook["entry"]):
        plain = line.replace(" -q", "") + " --collect-only -q"
        ran = Shell(shell.folder / "my-moe", shell.site).run(plain)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "test_exact_cases[my_loop" in ran.stdout
    assert read_expected(shell.folder / "my-moe" / "expected_failures.json")[0].executor == "my_loop"
    assert json.loads(blocks("json")[0].text)


def test_all_profiles_are_on_the_page() -> None:
    told = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", PAGE.read_text(), re.MULTILINE)
    assert told == list(profiles.PROFILES)
