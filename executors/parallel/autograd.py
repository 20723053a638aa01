"""Transports in autograd: the gradient of the way out is the way back, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from executors.parallel.agreement import met
from executors.parallel.transport import Transport
from executors.parallel.waiting import Arriving


class _Gradient(Function):
    """What a gradient comes to, which has none itself (D1)."""

    @staticmethod
    def forward(_ctx: Any, work: Callable[[Tensor], Arriving], value: Tensor) -> Tensor:
        return work(value)()

    @staticmethod
    def backward(_ctx: Any, *_gradients: Tensor) -> None:
        raise RuntimeError("expert_parallel: double backward is not supported; differentiate with create_graph=False")


def _once(work: Callable[[Tensor], Arriving], value: Tensor) -> Tensor:
    found: Tensor = _Gradient.apply(work, value)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def _together(transport: Transport, of: str, device: torch.device) -> Iterator[None]:
    """For gradients that travel, once all ranks are at them."""
    with transport.wire.together():
        met(transport.wire, f"the gradient of {of} of call {transport.number}", device)
        yield


class Out(Function):
    """From rows [T, H] and weights [T, K] to slots [S, H] and [S, 1], which are on their way."""

    @staticmethod
    def forward(
        ctx: Any, _rows: Tensor, _weights: Tensor, transport: Transport, rows: Arriving, weights: Arriving
    ) -> tuple[Tensor, Tensor]:
        """Waits for both."""
        ctx.transport = transport
        own_rows, own_weights = rows(), weights()
        needs = ((own_rows, transport.needs.rows), (own_weights, transport.needs.weights))
        ctx.mark_non_differentiable(*(own for own, needed in needs if not needed))
        return own_rows, own_weights

    @staticmethod
    def backward(ctx: Any, slots: Tensor, weights: Tensor) -> tuple[Tensor | None, ...]:
        """What any rank needs comes back on all, since they wait for each other."""
        transport = ctx.transport
        with _together(transport, "tokens", slots.device):
            of_rows = _once(transport.back, slots) if transport.needs.rows else None
            of_weights = _once(transport.weights_back, weights) if transport.needs.weights else None
            return of_rows, of_weights, None, None, None


class Back(Function):
    """From results of slots [S, H] to sums over each token's [T, H], which are on their way."""

    @staticmethod
    def forward(ctx: Any, _slots: Tensor, transport: Transport, results: Arriving) -> Tensor:
        """Waits for them."""
        ctx.transport = transport
        return results()

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        """Sends dy to the slots."""
        with _together(ctx.transport, "results", rows.device):
            return _once(ctx.transport.out, rows), None, None


class Mark(Function):
    """The same slots. A checkpoint that recomputes them ends here on every rank, and begins when a gradient comes here.

    It ends with the last tensor that is kept and begins with the first that is used. Without this one they would be
    those of the experts, and a rank without experts would exchange in another order than the rest.
    """

    @staticmethod
    def forward(ctx: Any, slots: Tensor) -> Tensor:
        """Keeps a tensor without numbers."""
        ctx.save_for_backward(slots.new_empty(0))
        return slots.view_as(slots)

    @staticmethod
    def backward(ctx: Any, slots: Tensor) -> Tensor:
        """Uses it."""
        assert len(ctx.saved_tensors) == 1
        return slots


class Nothing(Function):
    """Zeros for the slots of a rank without experts, whose backward pass waits with the others' all the same."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        """[S, H] zeros, whatever the rows hold."""
        ctx.likes = [(value.shape, value.dtype) for value in (rows, weights, *parameters)]
        return torch.zeros_like(rows)

    @staticmethod
    def backward(ctx: Any, slots: Tensor) -> tuple[Tensor | None, ...]:
        """Zeros."""
        needed = zip(ctx.likes, ctx.needs_input_grad, strict=True)
        return tuple(slots.new_zeros(shape, dtype=dtype) if own else None for (shape, dtype), own in needed)


def needing(value: Tensor, needed: bool) -> Tensor:
    """The same numbers, with a gradient if any rank needs one: then backward, which exchanges, runs on all ranks."""
    return value.detach().requires_grad_() if needed and not value.requires_grad else value
