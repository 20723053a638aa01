"""docs/tutorials/, followed every night: kernel.md and backends.md to the letter, fine-tune.md but for the set-up."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adding import BLOCK, ROOT, Block, Shell
from literal import Session

PAGES = ROOT / "docs" / "tutorials"
SET_UP = ("make ", ". .venv", "mkdir ", "cd ", "pip install ")


def parts(page: str) -> list[Block]:
    """Files, commands and what they print, in their order."""
    text = (PAGES / page).read_text()
    return [Block(found["title"] or "", found["language"], found["text"]) for found in BLOCK.finditer(text)]


def commands(block: Block) -> list[str]:
    return [line for line in block.text.splitlines() if not line.startswith(SET_UP)]


def run(shell: Shell, line: str) -> subprocess.CompletedProcess[str]:
    if line.startswith("PYTHONPATH=examples python -c "):
        (code,) = re.findall(r'-c "(.*)"$', line)
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}"}
        made = [sys.executable, "-c", code]
        return subprocess.run(made, cwd=shell.folder, env=environment, capture_output=True, text=True, check=False)
    return shell.run(line)


def plain(text: str) -> str:
    """Without what differs between machines."""
    return re.sub(r"-?\d+\.\d+(e[+-]\d+)?", "figure", " ".join(text.split()))


@pytest.mark.nightly
def test_a_fine_tune(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    shell = Shell(tmp_path)
    printed, said = "", []
    for block in parts("fine-tune.md"):
        if block.title:
            shell.write(block)
        elif block.language == "text":
            assert [plain(line) for line in printed.splitlines()] == [plain(line) for line in block.text.splitlines()]
        else:
            for line in commands(block):
                ran = run(shell, line)
                assert ran.returncode == 0, ran.stderr
                printed = ran.stdout
                said.append(printed)
    before, after = map(float, re.findall(r"(\d\.\d+) (?:before|after)", said[-2]))
    assert after < before - 0.3
    adapted, plain_base = map(float, re.findall(r"\d\.\d+", said[-1]))
    assert adapted < plain_base - 0.3
    assert (tmp_path / "losses.png").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.nightly
def test_a_kernel(tmp_path: Path) -> None:
    """Every block is run as it stands, in the folder that the page makes; only ``make install`` is done already."""
    session, said, codes = Session(tmp_path), "", []
    for block in parts("kernel.md"):
        if block.title:
            (session.cwd / block.title).write_text(block.text)
        elif block.language == "text":
            assert block.text in said
            for line in re.findall(r"^ +again: (.*)$", block.text, flags=re.MULTILINE):
                pasted = session.run(f"python -c {shlex.quote(line)}")
                assert pasted.returncode == 1
                assert "ConformanceError: mine breaks C1, E1, E2: y(0, 0)=" in pasted.stderr
        else:
            ran = session.run(block.text)
            codes.append(ran.returncode)
            said = ran.stdout
    assert codes == [0, 1, 0, 0, 0], said
    assert session.cwd == tmp_path / "my-kernel"
    assert "mine" in (session.cwd / "mine.html").read_text()


INSTALLING = "pip install --no-deps ./examples/peers"


@pytest.mark.nightly
def test_backends(tmp_path: Path) -> None:
    """Every block is run as it stands; but adapters are installed beside the checkout, not into this environment."""
    pytest.importorskip("transformers")
    shell, session, said = Shell(tmp_path), Session(tmp_path), ""
    shell.passes(f"pip install {ROOT / 'examples' / 'peers'}")
    for name in ("examples", "data"):
        (tmp_path / "moe-ref" / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(shell.site), str(ROOT)])
    for block in parts("backends.md"):
        if block.language == "text":
            lines = {plain(line) for line in block.text.splitlines()}
            assert lines <= {plain(line) for line in said.splitlines()} or plain(block.text) in plain(said), said
            continue
        text = block.text.replace(INSTALLING, f"export PYTHONPATH={path}")
        ran = session.run(text.replace("PYTHONPATH=examples ", f"PYTHONPATH=examples{os.pathsep}{path} "))
        judging = " report " in text or " compare " in text  # 1 says that something fails
        assert ran.returncode == judging, f"{text}\n{ran.stdout}\n{ran.stderr}"
        said += ran.stdout
    assert session.cwd == tmp_path / "my-model"
    assert "transformers_gpt_oss_grouped_mm" in (session.cwd / "trust.html").read_text()
    assert {each.name for each in (tmp_path / "moe-ref").iterdir()} == {".venv", "data", "examples", "pyproject.toml"}
