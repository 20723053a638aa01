"""A process in which torch multiplies 16-bit numbers as on a processor without instructions for them.

As a pytest plugin (``-p without_16_bit``), or to run a module: ``python -m without_16_bit executors compare``. Both
refuse to go on where torch does not take the setting.
"""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

SETTING = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
}


def environment() -> dict[str, str]:
    """Of a new process, in one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [str(Path(__file__).parent), kept.get("PYTHONPATH", "")]
    return kept | SETTING | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def why_not() -> str:
    """What torch still has of the processor, or ""."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":
        return f"torch uses {capability}, not AVX2"
    for name in ("bf16", "fp16"):
        if getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")():
            return f"oneDNN has products in {name}"
    return ""


def pytest_configure() -> None:
    """Ends the run, aloud, where it would not show what it is for."""
    reason = why_not()
    if reason:
        raise pytest.UsageError(reason)


if __name__ == "__main__":
    if why_not():
        sys.exit(why_not())
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
