"""C2: with declared batch invariance, a token gets the same bits whatever the other tokens are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, applicable
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.judgement.laws import of_tokens
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem

if TYPE_CHECKING:
    from executors import Executor


def check_batch_invariance(executor: Executor, problem: Problem, device: str = "cpu") -> bool:
    """Takes some tokens in another order and demands the same outputs, to the last bit.

    Returns:
        Whether the executor declares batch invariance.

    Raises:
        ConformanceError: if it does and an output differs.
    """
    if not executor.capabilities.batch_invariant:
        return False
    problem = applicable(executor, problem)
    arrays = build(problem)
    rng = np.random.default_rng(problem.seed)
    fewest = 0 if executor.capabilities.empty_batch else 1
    some = rng.permutation(problem.tokens)[: rng.integers(fewest, problem.tokens + 1)]
    with torch.no_grad():
        whole = run(executor, to_torch(problem, arrays, device), backward=False).tensors["y"]
        part = run(executor, to_torch(*of_tokens(problem, arrays, some), device), backward=False).tensors["y"]
    if not same_bits(whole[some], part):
        raise ConformanceError(executor, problem, "C2", f"y of tokens {some.tolist()[:8]} differs without the others")
    return True
