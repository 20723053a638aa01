"""What this machine is, and lines of progress. Standard library only."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path


def machine() -> str:
    """The processor, in words."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def tell(line: str) -> None:
    """Prints a line of progress at once."""
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)
