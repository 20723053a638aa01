"""The page on transformers is executed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/transformers.md"


def test_the_page_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    given: dict[str, Any] = {}
    implementations = []
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(block, given)
        implementations.append(given["model"].config._experts_implementation)
    assert given["tokens"].shape == (1, 11)
    said = re.findall(r"print\(.*\)  # (.*)", PAGE.read_text())
    assert said == capsys.readouterr().out.strip().splitlines()
    assert len(said) == 3
    assert implementations == ["moe_native", "moe_native", *["moe_auto"] * 3]
    same, small = given["same"].state_dict(), given["small"].state_dict()
    assert same.keys() == small.keys() == given["model"].state_dict().keys()
    assert all(torch.equal(same[key], small[key]) for key in same)
