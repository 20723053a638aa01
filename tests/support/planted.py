"""Tests that take an executor, and bugs planted in one that each of them must see."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import executors
from executors import Executor
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.call import Inputs, run, to_torch
from moe_ref.conformance.judgement.checks import result_arrays, verdicts_of
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.wrapped import SlotChange, Wrapped

NAMES = ("native", "grouped_mm")
BASE = Problem(24, 5, 16, 8, MoEConfig(2), entry="experts", gate_up_bias=True, down_bias=True)
ADAPTED = replace(BASE, gate_up_rank=2, down_rank=3)

Bug = str | Callable[[Executor], Executor]  # a mutant's name, or what makes a wrong executor of a right one
Check = Callable[[Executor], None]


class Catches:
    """A decorator that names the planted bugs in which a test must fail, and remembers them: one for each file."""

    def __init__(self) -> None:
        self.caught: list[tuple[Check, Bug]] = []

    def __call__(self, *bugs: Bug) -> Callable[[Check], Check]:
        def listed(test: Check) -> Check:
            self.caught.extend((test, bug) for bug in bugs)
            return test

        return listed

    def pairs(self) -> list[Any]:
        """(test, bug), for pytest to run."""
        return [pytest.param(*pair, id=f"{pair[0].__name__}-{i}") for i, pair in enumerate(self.caught)]

    def demand_that_all_have_bugs(self, names: dict[str, Any]) -> None:
        """Every test of an executor among a file's names has one, and passes where a wrapper changes nothing."""
        tests = {n: f for n, f in names.items() if n.startswith("test_") and "executor" in f.__annotations__}
        assert set(tests) == {check.__name__ for check, _ in self.caught}
        harmless = Wrapped("harmless", executors.get("native"), layer=lambda inner, *given: inner(*given))
        for test in tests.values():
            test(harmless)


def demand_caught(check: Check, planted: Bug, name: str) -> None:
    """The test fails on this executor with the bug planted in it."""
    inner = executors.get(name)
    with pytest.raises(AssertionError):
        check(mutants(inner)[planted] if isinstance(planted, str) else planted(inner))


def bug(change: SlotChange) -> Bug:
    """A planted bug that changes the layer with routing done elsewhere."""
    return lambda inner: Wrapped(getattr(change, "__name__", str(change)), inner, slots=change)


def inputs_of(problem: Problem) -> Inputs:
    """A problem's numbers in torch."""
    return to_torch(problem, build(problem))


def demand_error_bars(executor: Executor, problem: Problem, inputs: Inputs) -> None:
    """The same numbers as the problem's, in other strides."""
    with poisoned():
        result = run(executor, inputs)
    for verdict in verdicts_of(result_arrays(result), problem, reference(problem)):
        assert not verdict.failure


def with_gradient(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The value, whose gradient is changed on its way back."""
    value = value.view_as(value)
    if value.requires_grad:
        value.register_hook(change)
    return value


def with_gradients(weights: MoEWeights, change: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> MoEWeights:
    """The layer, some of whose gradients are changed on their way back."""
    parameters = weights.parameters()
    return weights.with_parameters({n: with_gradient(parameters[n], change) for n in names if n in parameters})
