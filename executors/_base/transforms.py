"""Forward mode, and the transforms of torch.func, around an operator.

torch does not show tangents and batches to the autograd of a custom operator, but to a `torch.autograd.Function`. So
calls under a transform go by those below, and all others by the operator alone. They keep nothing for a backward pass,
which computes the layer anew, to the same gradients (D4). Second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_map

from executors._base.arguments import NAMES, TENSORS, Arguments

ROWS = 3  # x, topk_ids and topk_weights, the first tensors of a call, have a row for each token
SPECIFICATION = "moe_ref.moe, in torch and float64, has second derivatives"


def are_active() -> bool:
    """Whether a call is under a transform of torch.func, or within a level of forward mode."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def layer(operator: Any, given: Arguments) -> Tensor:
    """y [T, H], with its tangent where inputs have some, and a row for each batch's tokens under vmap.

    Args:
        operator: of `executors._base.operator.define`.
        given: its arguments.

    Raises:
        RuntimeError: for a second derivative, when it is taken.
    """
    if torch.compiler.is_dynamo_compiling():  # which takes no function that has a jvp or a vmap of its own
        torch._dynamo.graph_break(msg="transforms of torch.func around a layer run in eager mode: use fullgraph=False")
    tensors = given.tensors()
    y: Tensor = _apply(_Layer, _Call(operator, given.with_tensors([None] * len(tensors))), *tensors)
    return y


@dataclass(frozen=True, eq=False)
class _Call:
    """A call without its tensors, which torch must see as arguments.

    Attributes:
        operator: that computes it.
        given: its arguments, without tensors.
        needs: for `NAMES`, whether a gradient is wanted; of `_Gradients`.
    """

    operator: Any
    given: Arguments
    needs: tuple[bool, ...] = ()

    @property
    def name(self) -> str:
        """Of the operator."""
        return str(self.operator.forward._name)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Arguments:
        """The arguments."""
        return self.given.with_tensors(tensors)


class _Layer(Function):
    """y [T, H]."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> Tensor:
        y: Tensor = call.operator.forward(*call.with_tensors(tensors), False, False)[0]
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        asked = dict(zip(Arguments._fields[:TENSORS], ctx.needs_input_grad[1:], strict=False))
        wanted = [name for name in NAMES if asked[name] and dy is not None]
        found: dict[str, Tensor] = {}
        if wanted:
            call = replace(ctx.call, needs=tuple(name in wanted for name in NAMES))
            found = dict(zip(wanted, _apply(_Gradients, call, dy, *ctx.saved_tensors), strict=True))
        scales = [None] * (len(ctx.needs_input_grad) - 1 - TENSORS)
        return None, *(found.get(name) for name in Arguments._fields[:TENSORS]), *scales

    @staticmethod
    def jvp(ctx: Any, _of_call: None, *tangents: Tensor | None) -> Tensor:
        found: Tensor = _apply(_Tangent, ctx.call, *tangents, *ctx.saved_tensors)
        return found

    @staticmethod
    def vmap(info: Any, dims: Any, call: _Call, *tensors: Any) -> tuple[Any, Any]:
        by_rows = [place < ROWS for place in range(len(tensors))]
        return _batched(_Layer, info.batch_size, call, tensors, dims[1:], by_rows)


class _Tangent(Function):
    """The tangent of y [T, H]: its arguments are the tangents of a call's tensors, then these tensors."""

    @staticmethod
    def forward(call: _Call, *both: Tensor | None) -> Tensor:
        count = len(both) // 2
        tangents = dict(zip(Arguments._fields[:TENSORS], both[:count], strict=False))
        of_names = [tangents[name] for name in NAMES]
        found: Tensor = call.operator.tangent(*of_names, *call.with_tensors(both[count:]))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{ctx.name}: reverse mode over forward mode is not supported; {SPECIFICATION}")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{ctx.name}: forward mode over forward mode is not supported; {SPECIFICATION}")

    @staticmethod
    def vmap(info: Any, dims: Any, call: _Call, *both: Any) -> tuple[Any, Any]:
        count = len(both) // 2
        by_rows = [place % count < ROWS for place in range(len(both))]
        return _batched(_Tangent, info.batch_size, call, both, dims[1:], by_rows)


class _Gradients(Function):
    """The gradients that are needed, from dy [T, H] and a call's tensors."""

    @staticmethod
    def forward(call: _Call, dy: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        given = call.with_tensors(tensors)
        _, *kept = call.operator.forward(*given, True, False)
        found = call.operator.backward(dy, *kept, list(call.needs), *given)
        return tuple(own for own, needed in zip(found, call.needs, strict=True) if needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{ctx.name}: double backward is not supported; {SPECIFICATION}")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{ctx.name}: forward mode over reverse mode is not supported; {SPECIFICATION}")

    @staticmethod
    def vmap(info: Any, dims: Any, call: _Call, *both: Any) -> tuple[Any, Any]:
        sums_tokens = any(call.needs[NAMES.index(name)] for name in NAMES if name not in ("x", "topk_weights"))
        by_rows = [place <= ROWS and not sums_tokens for place in range(len(both))]
        return _batched(_Gradients, info.batch_size, call, both, dims[1:], by_rows)


def _batched(
    function: Any, batch: int, call: _Call, tensors: Sequence[Any], dims: Sequence[Any], by_rows: Sequence[bool]
) -> tuple[Any, Any]:
    """The function over a batch, and the dimension of the batch in what it returns.

    Tokens do not depend on each other: where only tensors with a row for each token have a batch, and what is returned
    has one too, all tokens of all batches are one call. Otherwise there is a call for each element of the batch.
    """
    shared = [value is None or dim is None for value, dim in zip(tensors, dims, strict=True)]
    if all(alone or rows for alone, rows in zip(shared, by_rows, strict=True)):
        flat = [
            _rows_of(value, dim, batch) if rows and value is not None else value
            for value, dim, rows in zip(tensors, dims, by_rows, strict=True)
        ]
        return tree_map(lambda own: _apart(own, batch), _apply(function, call, *flat)), 0
    if not batch:
        raise RuntimeError(f"{call.name}: vmap over a batch of 0: must be at least 1 where parameters have a batch")
    parts = []
    for place in range(batch):
        own = [
            value if alone else value.select(dim, place)
            for value, dim, alone in zip(tensors, dims, shared, strict=True)
        ]
        parts.append(_apply(function, call, *own))
    return tree_map(lambda *own: torch.stack(own), *parts), 0


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _rows_of(value: Tensor, dim: int | None, batch: int) -> Tensor:
    """[B T, n] The rows of all batches."""
    whole = value.expand(batch, *value.shape) if dim is None else value.movedim(dim, 0)
    return whole.flatten(0, 1)


def _apart(rows: Tensor, batch: int) -> Tensor:
    """[B, T, n] of rows [B T, n]."""
    return rows.reshape(batch, rows.shape[0] // batch, rows.shape[1])
