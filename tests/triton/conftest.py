"""What tests of Triton's executor share."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where tuned tiles are stored, and looked for from now on."""
    from executors._triton import tuned

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.table.cache_clear()
    yield tmp_path / "moe-ref" / "tuned.json"
    tuned.table.cache_clear()
