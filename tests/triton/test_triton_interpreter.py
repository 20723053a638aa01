"""What ``triton`` mends in Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from triton_cases import interpreted


@interpreted
@pytest.mark.usefixtures("new_kernels")
def test_interpreter_rounds_bfloat16_to_nearest_even() -> None:
    @triton.jit
    def kernel(values, out, n: tl.constexpr):
        tl.store(out + tl.arange(0, n), tl.load(values + tl.arange(0, n)).to(tl.bfloat16))

    rng = np.random.default_rng(0)
    random = torch.from_numpy(rng.integers(0, 2**32, 4080, dtype=np.uint32).view(np.float32))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38] * 2)
    values = torch.cat([random, special])
    out = torch.zeros(4096, dtype=torch.bfloat16)
    kernel[(1,)](values, out, 4096)
    expected = values.to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()].view(torch.int16), expected[~out.isnan()].view(torch.int16))


@interpreted
@pytest.mark.usefixtures("new_kernels")
def test_interpreter_refuses_arithmetic_in_bfloat16() -> None:
    """It would add the bits as integers, without a word."""

    @triton.jit
    def kernel(values):
        tl.store(values, tl.load(values) + tl.load(values))

    with pytest.raises(Exception, match="arithmetic in bfloat16: must be in float32"):
        kernel[(1,)](torch.ones(1, dtype=torch.bfloat16))
