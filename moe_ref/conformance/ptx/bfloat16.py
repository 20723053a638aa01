"""Numbers in bf16, which NumPy does not have: as bits, and in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np


def from_bf16(bits: Any) -> Any:
    """Fp32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: Any) -> Any:
    """Fp32 rounded to nearest even, as bits; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)
