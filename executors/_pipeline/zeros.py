"""Memory for gradients, most of which may stay zero."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes of a cache line


def zeros_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the order of memory that ``torch.empty_like`` has.

    On a CPU the system hands out pages of zeros when they are first touched. So an expert without tokens costs neither
    time nor memory, where torch would write its zeros. NumPy also asks for huge pages, which are handed out faster.
    """
    if like.device.type != "cpu":
        return torch.zeros_like(like, dtype=dtype)
    strides = torch.empty_like(like, device="meta").stride()
    room = np.zeros(like.numel() * dtype.itemsize + LINE, dtype=np.uint8)
    first = -room.ctypes.data % LINE
    flat = torch.from_numpy(room[first : first + like.numel() * dtype.itemsize])
    return flat.view(dtype).as_strided(like.shape, strides)
