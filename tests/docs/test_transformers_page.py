"""The page on transformers is executed."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs/transformers.md"


def test_the_page_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    given: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(block, given)
    assert given["tokens"].shape == (1, 11)
    said = re.findall(r"print\(switched\)  # (.*)", PAGE.read_text())
    assert said == capsys.readouterr().out.strip().splitlines()
    assert given["model"].config._experts_implementation == "moe_native"
