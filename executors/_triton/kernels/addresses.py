"""Addresses that do not wrap (clause E5)."""

import triton
import triton.language as tl


@triton.jit
def offset(index, stride):
    """index * stride in 64 bits, whatever the dtypes of the two (E5)."""
    return index.to(tl.int64) * stride
