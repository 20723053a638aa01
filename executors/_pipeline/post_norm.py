"""The norm of each expert's output in torch, forward and backward, evaluated in at least fp32 (clause E8).

With n = gamma o and r = 1 / sqrt(mean(n**2) + eps) it is o' = n r. Rows that belong to no expert are never used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executors._base.arguments import Norm
from executors._pipeline.activation import row_blocks


class NormGradients(NamedTuple):
    """What comes back through the norm.

    Attributes:
        d_outputs: [S, H] the gradient of o, in o's dtype.
        of_rows: [S] <dy, o'>, the gradient of the weights, in at least fp32; or None.
        of_factor: [S, H] what the gradient of gamma is the sum of, in at least fp32; or None.
    """

    d_outputs: Tensor
    of_rows: Tensor | None
    of_factor: Tensor | None


def forward_(o: Tensor, norm: Norm) -> None:
    """Writes o' [S, H] over o."""
    for rows in row_blocks(o):
        n, r = _scaled(o[rows], norm)
        o[rows] = n.mul_(r)


def tangent_(o: Tensor, d_outputs: Tensor | None, norm: Norm, d_factor: Tensor | None) -> Tensor | None:
    """Writes o' [S, H] over o, and returns its tangent, in at least fp32; None without tangents.

    Args:
        o: [S, H] outputs before the norm.
        d_outputs: [S, H] their tangent, in at least fp32, which is written over.
        norm: the norm.
        d_factor: [H] the factor's tangent.
    """
    if d_outputs is None and d_factor is None:
        forward_(o, norm)
        return None
    wide = torch.promote_types(o.dtype, torch.float32)
    found = torch.zeros(o.shape, dtype=wide, device=o.device) if d_outputs is None else d_outputs
    for rows in row_blocks(o):
        n, r = _scaled(o[rows], norm)
        dn = found[rows].mul_(norm.factor.to(wide))
        if d_factor is not None:
            dn.addcmul_(o[rows].to(wide), d_factor.to(wide))
        normed = n.mul_(r)
        dn.addcmul_(normed, (normed * dn).mean(1, keepdim=True), value=-1).mul_(r)
        o[rows] = normed
    return found


def backward(
    o: Tensor, norm: Norm, upstream: Tensor, weight: Tensor | None, needs_rows: bool, needs_factor: bool
) -> NormGradients:
    """Gradients from the rows' upstream gradient of y.

    Args:
        o: [S, H] outputs before the norm.
        norm: the norm.
        upstream: [S, H] dy of each row's token.
        weight: [S, 1] the routing weight of each row, or None for ones.
        needs_rows: whether ``of_rows`` is wanted.
        needs_factor: whether ``of_factor`` is wanted.
    """
    wide = torch.promote_types(o.dtype, torch.float32)
    d_outputs = torch.empty_like(o)
    of_rows = o.new_empty(o.shape[0], dtype=wide) if needs_rows else None
    of_factor = o.new_empty(o.shape, dtype=wide) if needs_factor else None
    gamma = norm.factor.to(wide)
    for rows in row_blocks(o):
        n, r = _scaled(o[rows], norm)
        normed, dy = n.mul_(r), upstream[rows].to(wide)
        if of_rows is not None:
            of_rows[rows] = (normed * dy).sum(1)
        d_normed = dy if weight is None else dy * weight[rows]
        shared = (normed * d_normed).mean(1, keepdim=True)
        dn = torch.addcmul(d_normed, normed, shared, value=-1).mul_(r)
        if of_factor is not None:
            torch.mul(o[rows], dn, out=of_factor[rows])
        d_outputs[rows] = dn.mul_(gamma)
    return NormGradients(d_outputs, of_rows, of_factor)


def _scaled(o: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """N [n, H] and r [n, 1], in at least fp32."""
    wide = torch.promote_types(o.dtype, torch.float32)
    n = o.to(wide) * norm.factor.to(wide)
    return n, n.square().mean(1, keepdim=True).add_(norm.eps).rsqrt_()
