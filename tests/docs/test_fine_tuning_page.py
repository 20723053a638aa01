"""The page on fine-tuning is executed."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs/fine-tuning.md"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # PEFT's call
def test_the_page_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    """And each line that it prints is the one that stands beside it, but for what transformers logs."""
    pytest.importorskip("peft", reason="the extra moe-ref[qlora]")
    pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")
    given: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, given)
    said = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), flags=re.MULTILINE)
    printed = capsys.readouterr().out.strip().splitlines()
    assert said == [line for line in printed if line and not line.startswith("{'")]
    assert given["written"].shape == (1, 24)
