"""Finds what a norm after each expert computes, by its values alone.

The specification's only norm is n = (1 + weight) x, then n / sqrt(mean(n**2) + eps) (clause E8). With a weight of 0 and
an x far below the epsilon it is x / sqrt(eps), which tells the epsilon. What is found so counts if it agrees with the
module on rows of many sizes, under a weight that tells the factor's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

NEAR = 2e-6  # of the largest number of a row: norms compute in fp32
TINY = 1e-15  # the square is far below any epsilon
DIGITS = (1, 2, 3, 4, 5, 6)

Apply = Callable[[Tensor, Tensor], Tensor]


def eps_of(norm: Any) -> float | None:
    """The epsilon of a module that is this norm, or None for any other; nothing of the module is changed.

    Args:
        norm: a module with one parameter, ``weight`` [H], and no buffer; it may be on the meta device.
    """
    if not isinstance(norm, nn.Module) or [name for name, _ in norm.named_parameters()] != ["weight"]:
        return None
    width = norm.get_parameter("weight").shape
    if len(width) != 1 or any(True for _ in norm.buffers()):
        return None

    def apply(weight: Tensor, x: Tensor) -> Tensor:
        return functional_call(norm, {"weight": weight}, (x,))

    with torch.no_grad():
        try:
            return next((eps for eps in _guesses(apply, *width) if _agrees(apply, *width, eps)), None)
        except (RuntimeError, TypeError, ValueError):  # it takes other arguments than rows
            return None


def factor_of(norm: nn.Module) -> Tensor:
    """Gamma [H], with a gradient that reaches the module's weight."""
    return 1.0 + norm.get_parameter("weight")


def _guesses(apply: Apply, width: int) -> list[float]:
    """The epsilon, rounded to ever more digits."""
    ratio = float(apply(torch.zeros(width), torch.full((1, width), TINY))[0, 0]) / TINY
    if not math.isfinite(ratio) or ratio <= 0:
        return []
    return list(dict.fromkeys(float(f"{ratio**-2:.{digits}g}") for digits in DIGITS))


def _agrees(apply: Apply, width: int, eps: float) -> bool:
    """Whether the norm is the rule on rows about the epsilon, far below and far above it."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(width, generator=generator), torch.randn(64, width, generator=generator)
    weight[1:2] = -1.0  # a factor of 0
    x *= math.sqrt(eps) * torch.logspace(-4, 4, 64)[:, None]
    x[0] = 0.0
    n = (1 + weight.double()) * x.double()
    expected = n / (n.square().mean(1, keepdim=True) + eps).sqrt()
    actual = apply(weight, x)
    if actual.shape != expected.shape or actual.dtype != x.dtype:
        return False
    size = expected.abs().amax(1, keepdim=True)
    return bool(((actual.double() - expected).abs() <= NEAR * size).all())
