"""Writes what the figures are measured on: python benchmarks/gpu_machine.py FILE [--need-cuda]."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from gpu_summary import write_json


def machine() -> dict[str, Any]:
    """Processor, GPU, driver, and the versions of all packages that can be imported."""
    packages = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "gpu": gpu(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def gpu() -> dict[str, Any] | None:
    """The first GPU, or None."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "driver": _driver(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def main(file: str, *options: str) -> int:
    """Exit status 1 where a GPU is needed and there is none."""
    found = machine()
    write_json(Path(file), found)
    name = found["gpu"]["name"] if found["gpu"] else "no CUDA device"
    print(f"{name}, torch {torch.__version__}, Triton {found['packages'].get('triton')}")
    return int("--need-cuda" in options and found["gpu"] is None)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
