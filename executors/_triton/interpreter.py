"""Mends what Triton's interpreter gets wrong in bfloat16, so that kernels need no code for it.

The interpreter keeps bfloat16 as raw 16-bit integers. It multiplies those integers in a dot product, and it truncates
where a GPU rounds to nearest even. This module mends conversions and dot products, and refuses all other arithmetic in
bfloat16. The interpreter has one place in the grid for the whole process, so launches of several threads wait for one
another. It is used only under `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, interpreter_builder

REFUSED = ("binary_op", "unary_op", "create_fma", "create_fdiv", "create_erf", "create_rsqrt")
_ONE_LAUNCH = Lock()  # at a time


@functools.cache
def mend() -> None:
    """Puts the mended operations in place, once."""
    builder: Any = InterpreterBuilder
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot
    plain_run, plain_call = InterpretedFunction.run, InterpretedFunction.__call__
    patched: set[int] = set()

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        source = widened(source)
        if dtype.scalar != tl.bfloat16:
            return plain_cast(self, source, dtype)
        return TensorHandle(narrowed(source.data.astype(np.float32)), tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return plain_dot(self, in_rows(widened(a)), in_rows(widened(b)), *others)

    def run(self: Any, *args: Any, **options: Any) -> Any:
        with _ONE_LAUNCH, np.errstate(all="ignore"):  # as a GPU, which does not warn of infinities
            patched.clear()
            return plain_run(self, *args, **options)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        """A function that a kernel calls: the language is patched once for a launch, not at every call."""
        if id(self.fn.__globals__) in patched:
            return self.rewrite()(*args, **options)
        patched.add(id(self.fn.__globals__))
        return plain_call(self, *args, **options)

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)  # a quarter of the time
    builder.cast_impl, builder.create_dot = cast, dot
    InterpretedFunction.run, InterpretedFunction.__call__ = run, call
    builder.create_fp_to_fp = lambda self, source, dtype, _mode: cast(self, source, dtype)
    for name in REFUSED:
        if hasattr(builder, name):
            setattr(builder, name, _refusing(getattr(builder, name)))


def widened(handle: Any) -> Any:
    """A bfloat16 tensor of the interpreter in fp32; any other as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def in_rows(handle: Any) -> Any:
    """The same in contiguous rows: NumPy sums a product of a transposed operand in another order."""
    return TensorHandle(np.ascontiguousarray(handle.data), handle.dtype)


def narrowed(values: np.ndarray) -> np.ndarray:
    """The bits of fp32 values rounded to bfloat16, to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _refusing(operation: Any) -> Any:
    @functools.wraps(operation)
    def refuse(self: Any, *operands: Any) -> Any:
        if any(getattr(getattr(o, "dtype", None), "scalar", None) == tl.bfloat16 for o in operands):
            raise TypeError("arithmetic in bfloat16: must be in float32 under the interpreter, which has none")
        return operation(self, *operands)

    return refuse
