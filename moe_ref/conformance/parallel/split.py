"""A problem cut over ranks: what each runs, and how their results are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from moe_ref.conformance.judgement.call import Inputs, call, to_torch
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.conformance.problems.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from executors import Executor

TOKEN_TENSORS = ("x", "router_logits", "topk_weights")


@dataclass(frozen=True)
class Split:
    """How a problem is spread.

    Attributes:
        cuts: [W - 1] sorted, from 0 to T: rank r has the tokens between cuts r - 1 and r.
        dispatch: "all_to_all", where each rank has its tokens, or "all_reduce", where all have all.
        returns: "slot" or "rank".
        order: [W] which part of the tokens each rank has; () is their order.
        bounded: whether exchanges have the size of a bound, which no rank passes.
    """

    cuts: tuple[int, ...] = ()
    dispatch: str = "all_to_all"
    returns: str = "slot"
    order: tuple[int, ...] = ()
    bounded: bool = False

    @property
    def ranks(self) -> int:
        """W."""
        return len(self.cuts) + 1

    def rank_of(self, part: int) -> int:
        """The rank that has a part of the tokens."""
        return self.order.index(part) if self.order else part

    def tokens(self, rank: int, tokens: int) -> slice:
        """The tokens of a rank."""
        if self.dispatch == "all_reduce":
            return slice(0, tokens)
        ends, part = (0, *self.cuts, tokens), self.order[rank] if self.order else rank
        return slice(ends[part], ends[part + 1])


Made = Callable[[str, Any, Split, Problem], "Executor"]


def made(name: str, group: Any, split: Split, problem: Problem) -> Executor:
    """The parallel executor around one of this name."""
    from executors import parallel

    return parallel.ExpertParallel(name, group, **options(split, problem))


def options(split: Split, problem: Problem) -> dict[str, Any]:
    """Those of the parallel executor for a split."""
    return {
        "dispatch": split.dispatch,
        "returns": split.returns,
        "num_experts": problem.experts,
        "timeout": 30.0,
        "max_slots": max(1, problem.tokens * problem.top_k) if split.bounded else None,
    }


def run_part(group: Any, name: str, problem: Problem, split: Split, make: Made = made) -> dict[str, Any]:
    """One rank's y and gradients, by name, as NumPy arrays of float64 and with their dtypes' names.

    Gradients have the shapes of the whole layer: those of tokens and experts of others are 0, or None where there is
    none at all.
    """
    from executors import parallel

    inputs = to_torch(problem, build(problem))
    tokens = split.tokens(dist.get_rank(group), problem.tokens)
    weights, _ = parallel.shard(inputs.weights, group)
    executor = make(name, group, split, problem)
    names = ("x", "dy", "router_logits", "topk_ids", "topk_weights")
    own = {name: _rows(getattr(inputs, name), tokens) for name in names}
    with poisoned():
        y = call(executor, replace(inputs, **own, weights=weights))  # type: ignore[arg-type]
        found: dict[str, Any] = {"y": y.detach()}
        if executor.capabilities.backward and y.requires_grad:
            torch.autograd.backward(y, own["dy"])
    return {n: _plain(v) for n, v in (found | _gradients(inputs)).items()}


def _rows(value: Tensor | None, tokens: slice) -> Tensor | None:
    """[T', ...] some tokens, with a gradient that reaches the whole."""
    return None if value is None else value.reshape(-1, value.shape[-1])[tokens]


def _gradients(inputs: Inputs) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for name, leaf in inputs.tensors().items():
        if leaf.requires_grad:
            found[name] = leaf.grad
            if name in TOKEN_TENSORS and leaf.grad is not None:
                found[name] = leaf.grad.reshape(-1, leaf.shape[-1])
    return found


def _plain(value: Tensor | None) -> Any:
    return None if value is None else (value.double().numpy(), str(value.dtype).removeprefix("torch."))


def joined(parts: Sequence[dict[str, Any]], problem: Problem, split: Split) -> dict[str, Any]:
    """The whole's y and gradients in float64, by name; None for a gradient that no rank has.

    Parameters' gradients add up over ranks. Under "all_reduce" those of tokens are the same on all.

    Raises:
        ValueError: ranks that must have the same differ, or a dtype is wrong; in one line.
    """
    out: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        for rank, value in enumerate(values):
            if value is not None and value[1] != problem.dtype_of(name):
                raise ValueError(f"{name} is {value[1]} on rank {rank}, but must be {problem.dtype_of(name)} (T2)")
        arrays = [value[0] for value in values if value is not None]
        same = split.dispatch == "all_reduce" and (name == "y" or name in TOKEN_TENSORS or name == "expert_scale")
        lacking = [rank for rank, value in enumerate(values) if value is None]
        if not arrays:
            out[name] = None
        elif lacking:
            raise ValueError(f"{name} has no gradient on rank {lacking[0]}, but must have one on all (D1)")
        elif same:
            bits = [array.tobytes() for array in arrays]
            if len(set(bits)) > 1:
                raise ValueError(f"{name} differs between ranks that have the same tokens")
            out[name] = arrays[0]
        elif name == "y":
            out[name] = np.concatenate([arrays[split.rank_of(part)] for part in range(split.ranks)])
        else:
            out[name] = sum(arrays[1:], arrays[0])
    return out


def within(problem: Problem) -> Problem:
    """The problem as several ranks take it: in dtypes that travel, and with all tokens in one dimension."""
    dtype = "bfloat16" if problem.dtype == "float16" else problem.dtype
    return replace(problem, dtype=dtype, batch=False, powers=() if problem.dtype == "float16" else problem.powers)
