"""What came of the stages, for people in 80 columns and for programs. Standard library only."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from gpu_run import Outcome

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80
SHOWN = 12  # last lines of the log of a stage that failed


def table(outcomes: list[Outcome]) -> list[str]:
    """A line for each stage."""
    name = max([len("stage"), *(len(outcome.name) for outcome in outcomes)])
    lines = [f"{'stage':{name}}  {'status':9} {'s':>5}  last line, or why not"]
    for outcome in outcomes:
        line = f"{outcome.name:{name}}  {outcome.status:9} {outcome.seconds:5.0f}  {outcome.said}"
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 3] + "...")
    return lines


def failures(outcomes: list[Outcome], out: Path) -> list[str]:
    """The end of each log of a stage that failed."""
    lines = []
    for outcome in outcomes:
        log = out / f"{outcome.name}.log"
        if outcome.failed and log.exists():
            lines += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-SHOWN:], ""]
    return lines


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file, whole or not at all, as `executors` does, which is not installed yet."""
    spec = spec_from_file_location("whole", ROOT / "executors" / "_files" / "whole.py")
    assert spec is not None
    assert spec.loader is not None
    whole = module_from_spec(spec)
    spec.loader.exec_module(whole)
    whole.write_json(path, content)
