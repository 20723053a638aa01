"""The loop that bitsandbytes has for processors without AVX-512, on any processor.

The library takes its vectors by what the processor tells (CPUID), which no setting of torch changes. But it takes them
only for rows that are a multiple of 16 numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def without_vectors(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator on the same blocks, in one row that is longer by two numbers."""

    def narrow(
        codes: Tensor, scales: Tensor, blocksize: int, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        longer = torch.cat([codes, codes.new_zeros(1)]), torch.cat([scales, scales.new_ones(1)])
        found = operator(*longer, blocksize, quant_type, (1, 2 * codes.shape[0] + 2), dtype)
        return found.view(-1)[:-2].view(shape)

    return narrow
