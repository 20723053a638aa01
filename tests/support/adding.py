"""docs/adding-an-executor.md: its files, its command lines, and a shell that follows them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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

    def __init__(self, folder: Path, site: Path | None = None) -> None:
        self.folder, self.site = folder, site or folder / "site"

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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        return path


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
