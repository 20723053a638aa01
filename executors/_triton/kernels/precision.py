"""How operands of a product are rounded."""

import triton
import triton.language as tl

TF32_STEP = tl.constexpr(0x2000)  # TF32 is fp32 without the last 13 bits


@triton.jit
def rounded(values, PRECISION):
    """The operand in fp32, rounded to TF32 where PRECISION is "tf32"; else as it is.

    Tensor cores ignore the last 13 bits of an operand in fp32. Left to them, every operand would shrink, and so would
    every result. This rounds to nearest, ties away from zero, as PTX's cvt.rna.tf32 does. A NaN stays one (ADR 14).
    """
    if PRECISION == "tf32":
        bits = values.to(tl.int32, bitcast=True)
        nearest = tl.where(values == values, bits + TF32_STEP // 2, bits | TF32_STEP) & -TF32_STEP
        values = nearest.to(tl.float32, bitcast=True)
    return values
