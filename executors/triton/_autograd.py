"""What differentiating the operators of this package does: it is refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from executors._protocol import Unsupported


def no_backward(_ctx: Any, *_gradients: Tensor | None) -> None:
    """Raises Unsupported: a gradient that misses a part would be wrong without a word."""
    raise Unsupported("triton has no backward pass: must be called under torch.no_grad(), or be another executor")
