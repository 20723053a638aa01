"""The specification as something that computes experts in training: exact, or with the roundings that it allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ref.layer import layer, layer_vjp
from moe_ref.numerics import EXACT, FORMATS, Perturbed, Rounding, accumulator
from moe_ref.routing import route, weigh
from moe_ref.types import MoEWeights
from tiny.model import Compute

ADDITIONS = ("z", "o")  # sites where a bias is added: one rounding, whatever the implementation


@dataclass(frozen=True)
class Honest:
    """The rounding policy of one made-up right executor, which errs wherever clause E2 lets it.

    Those of even number have random errors of full size. Those of odd number round to nearest, and have random errors
    in sums of products alone, before these are rounded. Random errors stand for all that an implementation may do, but
    they know nothing of where real roundings agree: after one step of Adam all biases have moved by the same amount,
    up to the gradient's sign, so that adding them rounds alike for all tokens, and along the gradient.

    Attributes:
        dtype: the experts' dtype.
        number: of this executor; each errs in its own way.
        seed: of all of them.
    """

    dtype: str
    number: int
    seed: int = 0

    def store(self, site: str, value: Tensor) -> Tensor:
        """A value kept in ``dtype``: relative errors of up to its unit roundoff."""
        if self.number % 2:
            return _rounded(value, self.dtype)
        return self._errors("storage", self.dtype).store(site, value)

    def accumulate(self, site: str, value: Tensor, sd: Any) -> Tensor:
        """A sum in the accumulator's format, which errs as sums of that length do."""
        form = accumulator(self.dtype).name
        if not (self.number % 2 and site in ADDITIONS):
            value = self._errors("accumulation", form).accumulate(site, value, sd)
        return _rounded(value, form) if self.number % 2 else value

    def _errors(self, kind: str, dtype: str) -> Perturbed:
        form = FORMATS[dtype]
        return Perturbed(kind, 1, self.seed, self.number // 2, form.smallest_normal, form.unit_roundoff)


def specified(dtype: str, rounding: Rounding = EXACT) -> Compute:
    """Experts by `moe_ref`, forward and backward, in float64 on the CPU.

    Like an executor it is given x and weights in ``dtype`` and router_logits in float32; it only keeps them in float64.

    Args:
        dtype: the experts' dtype.
        rounding: exact by default; with any other policy the result and the gradients are rounded to their own dtypes.
    """

    def compute(x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        rows, logits = x.reshape(-1, x.shape[-1]), router_logits.reshape(-1, router_logits.shape[-1])
        y = _Layer.apply(rows, logits, weights, dtype, rounding, *weights.parameters().values())  # type: ignore[no-untyped-call]
        return y.reshape(x.shape)

    return compute


class _Layer(torch.autograd.Function):
    """The layer; narrowing its inputs has derivative 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, logits: Tensor, weights: MoEWeights, dtype: str, rounding: Rounding, *parameters: Tensor
    ) -> Tensor:
        low = weights.to("cpu", dtype=dtype).map(lambda value: value.detach().double())
        rows, low_logits = _narrowed(x, dtype)[None], _narrowed(logits, "float32")[None]  # one sample
        ids = route(low_logits[0], weights.config).topk_ids
        ctx.given, ctx.dtype, ctx.rounding = (rows, low_logits, ids, low), dtype, rounding
        y = layer(rows, ids, weigh(low_logits, ids, weights.config, rounding), low, rounding)
        return _finished(y, dtype, rounding).to(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, logits, ids, low = ctx.given
        _, found = layer_vjp(rows, logits, ids, None, low, _narrowed(dy, ctx.dtype)[None], ctx.rounding)
        dx, *d_parameters = (
            _finished(getattr(found, name), ctx.dtype, ctx.rounding).to(dy) for name in ("x", *low.parameters())
        )
        d_logits: Any = found.router_logits
        return dx, _finished(d_logits, "float32", ctx.rounding).to(dy), None, None, None, *d_parameters


def _narrowed(value: Tensor, dtype: str) -> Tensor:
    """The numbers of ``dtype`` that an executor is given, in float64 on the CPU."""
    return value.detach().to(getattr(torch, dtype)).cpu().double()


def _finished(value: Tensor, dtype: str, rounding: Rounding) -> Tensor:
    """The only sample, rounded once more to its own dtype, unless it is exact."""
    return value[0] if rounding is EXACT else _rounded(value[0], dtype)


def _rounded(value: Tensor, dtype: str) -> Tensor:
    """To the nearest number of ``dtype``, in float64."""
    return value.to(getattr(torch, dtype)).double()
