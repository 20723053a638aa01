"""What a test makes of an answer of bitsandbytes that is neither ours nor the one that was measured."""

from importlib.metadata import version
from typing import NoReturn

import pytest
import torch

MEASURED = "0.50.2"  # as docs/known-differences.md has it, with AVX-512 and its bf16 instructions


def as_measured() -> bool:
    """Whether this is the version and the kind of processor that the known differences were found with."""
    functional = pytest.importorskip("bitsandbytes.functional")
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(functional.has_avx512bf16())
    return avx512 and version("bitsandbytes") == MEASURED


def differs(seen: str) -> NoReturn:
    """Fails where the differences were measured; elsewhere the library may have others, and the test skips."""
    if as_measured():
        pytest.fail(seen)
    capability = torch.backends.cpu.get_cpu_capability()
    pytest.skip(f"bitsandbytes {version('bitsandbytes')} differs in another way here ({capability}): {seen}")
