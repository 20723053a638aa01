"""What the suite demands of an executor on one problem. Each failure names its clause and prints the problem."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_ref.conformance.judgement.call import Inputs, Result, run, to_torch
from moe_ref.conformance.judgement.choices import admissible
from moe_ref.conformance.judgement.faults import Fault, changed, copies, different, wrong_forms
from moe_ref.conformance.judgement.gates import CLAUSES, Verdict, judge
from moe_ref.conformance.judgement.reference import Reference, reference
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.poison import SAYS, Mode, modes
from moe_ref.conformance.problems.problem import Problem
from moe_ref.routing import keys_are_rounded
from moe_ref.types import PER_EXPERT, Routing
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Executor


class ConformanceError(AssertionError):
    """An executor broke a clause of the specification.

    Args:
        executor: the executor.
        problem: on what.
        clause: the clauses, one of which is broken, or what else is.
        message: what is wrong, in one line.
        tensor: "y", or the input whose gradient is wrong; "" for neither.
        arrays: the problem's numbers, where it does not determine them itself.
        more: what else is wrong with the same results.
    """

    def __init__(
        self,
        executor: Executor,
        problem: Problem,
        clause: str,
        message: str,
        tensor: str = "",
        arrays: Arrays | None = None,
        more: Sequence[Fault] = (),
    ) -> None:
        super().__init__(f"{executor.name} breaks {clause}: {message}\n  {problem}")
        self.executor, self.problem, self.clause, self.arrays = executor, problem, clause, arrays
        self.faults = (Fault(clause, message, tensor), *more)

    def only(self, faults: Sequence[Fault]) -> ConformanceError:
        """The same with some of its faults."""
        first, *more = faults
        return (
            self
            if [*self.faults] == [*faults]
            else ConformanceError(self.executor, self.problem, *first, self.arrays, more)
        )


def labels(clause: str) -> tuple[str, ...]:
    """The clauses in what an error is said to break, such as E1 and E2 in "E1, E2 (long_sums)"; or it itself."""
    return tuple(re.findall(r"\b[A-Z]\d\b", clause)) or (clause,)


def applicable(executor: Executor, problem: Problem) -> Problem:
    """The problem within the executor's declared capabilities.

    An executor that declares no routing gets ids and weights instead of logits. An executor that does not tell which
    experts it chooses gets logits that leave no choice.
    """
    if problem.entry == "layer" and not executor.capabilities.routing:
        factor = problem.config.routed_scaling_factor
        mantissa, exponent = math.frexp(factor)
        scaled = bool(problem.powers) and mantissa == 0.5  # 2**(exponent - 1), which the given weights then have
        return replace(
            problem,
            entry="experts",
            selection_bias="",
            expert_scale=False,
            frozen=problem.frozen - {"router_logits"},
            powers=(*problem.powers, *((("topk_weights", exponent - 1),) if scaled and exponent != 1 else ())),
        )
    return problem if hasattr(executor, "route") else with_one_choice(problem)


def with_one_choice(problem: Problem) -> Problem:
    """The problem with only one right choice of experts.

    Broken logits leave the choice free. They are left out where the weight scales the input, because gradients do not
    show the choice there.
    """
    if problem.entry != "layer":
        return problem
    broken = 0 if problem.config.scale_input else problem.broken_logits
    rounded = keys_are_rounded(problem.config, problem.selection_bias or None)
    return replace(problem, margins=rounded, broken_logits=broken)


def check_problem(executor: Executor, problem: Problem, device: str = "cpu") -> list[Verdict]:
    """Forward and backward against the specification: routing, values, gradients, dtypes, untouched inputs.

    Returns:
        A verdict for y and each gradient, all passed.

    Raises:
        ConformanceError: a clause is broken; `ConformanceError.faults` has all that were found.
    """
    problem = applicable(executor, problem)
    return check_numbers(executor, problem, reference(problem), lambda ids: reference(problem, ids), device)


def check_numbers(
    executor: Executor,
    problem: Problem,
    truth: Reference,
    choosing: Callable[[tuple[int, ...]], Reference],
    device: str = "cpu",
) -> list[Verdict]:
    """`check_problem` against a reference that is at hand.

    Args:
        executor: the executor to check.
        problem: the description, within the executor's capabilities (`applicable`).
        truth: the numbers and the exact answer.
        choosing: the reference of T*K ids that the executor chose, where more than one choice is right.
        device: the device to run on.

    Returns:
        A verdict for y and each gradient, all passed.

    Raises:
        ConformanceError: a clause is broken; `ConformanceError.faults` has all that were found.
    """
    verdicts: list[Verdict] = []
    faults: dict[Mode, list[Fault]] = {}
    arrays = truth.arrays
    for mode in modes(executor):
        verdicts, faults[mode], own = _judged_in(mode, executor, problem, truth, choosing, device)
        arrays = own if faults[mode] else arrays
    _demand(executor, problem, *_joined(faults), arrays=arrays)
    return verdicts


def _judged_in(
    mode: Mode,
    executor: Executor,
    problem: Problem,
    truth: Reference,
    choosing: Callable[[tuple[int, ...]], Reference],
    device: str,
) -> tuple[list[Verdict], list[Fault], Arrays]:
    """The verdicts of a run forward and backward, all faults of it and of a run without gradients, and the numbers."""
    inputs = to_torch(problem, truth.arrays, device)
    routing = _route(executor, inputs, mode)
    chosen = None
    if routing is not None:
        chosen = check_route(executor, problem, truth, routing)
        if (chosen != truth.arrays.topk_ids)[~truth.broken_routing].any():  # another right choice: judged on its own
            truth = choosing(tuple(chosen.ravel().tolist()))
            inputs = to_torch(problem, truth.arrays, device)
    before, backward = copies(inputs), executor.capabilities.backward
    with mode():
        result = run(executor, inputs, backward)
    faults = [*filter(None, [changed(inputs, before)]), *wrong_forms(result, inputs, backward)]
    verdicts = verdicts_of(result_arrays(result), problem, truth, chosen)
    with mode(), torch.no_grad():  # inference may take another path
        inference = run(executor, inputs, backward=False)
    faults += wrong_forms(inference, inputs, backward)
    past_range = problem.powers and problem.dtype == "float16"
    for verdict in verdicts + verdicts_of(result_arrays(inference), problem, truth, chosen):
        if verdict.failure:
            clause = "R4" if truth.broken.any() else "E7" if past_range else CLAUSES[verdict.name]
            faults.append(Fault(clause, verdict.failure, verdict.name))
    return verdicts, faults, truth.arrays


def _joined(faults: Mapping[Mode, Sequence[Fault]]) -> Iterator[Fault]:
    """The faults of all modes; those that one mode alone shows say which."""
    for mode, own in faults.items():
        others = {(fault.clause, fault.tensor) for other in faults.keys() - {mode} for fault in faults[other]}
        for fault in own:
            alone = len(faults) > 1 and (fault.clause, fault.tensor) not in others
            yield fault._replace(message=f"{fault.message}; only {SAYS[mode]}") if alone else fault


def check_repeatable(executor: Executor, problem: Problem, device: str = "cpu") -> None:
    """C1: two runs agree to the last bit, and so do two backward passes; no earlier weights are remembered.

    Raises:
        ConformanceError: if they do not.
    """
    problem = applicable(executor, problem)
    arrays = build(problem)
    inputs = to_torch(problem, arrays, device)
    backward = executor.capabilities.backward
    first = run(executor, inputs, backward)

    def same(second: Result, between: str) -> None:
        _demand(executor, problem, different(first, second, between))

    same(run(executor, inputs, backward), "two runs on the same input")
    same(run(executor, inputs, backward, passes=2), "two backward passes through one graph")
    other = to_torch(problem, arrays, device)
    with torch.no_grad():
        for tensor in other.weights.parameters().values():
            tensor.mul_(2)
        _swap_codes(other)
        run(executor, other, backward=False)
        for tensor in other.weights.parameters().values():
            tensor.div_(2)
        _swap_codes(other)
    same(run(executor, other, backward), "new weights and the same ones put where others were")


def _swap_codes(inputs: Inputs) -> None:
    """Replaces codes in place; a second call restores them."""
    for tensor in inputs.weights.packed().values():
        tensor.codes.bitwise_xor_(0x11)


def result_arrays(result: Result) -> dict[str, np.ndarray]:
    """A result's tensors in float64 NumPy."""
    return {name: result.numpy(name) for name in result.tensors}


def verdicts_of(
    arrays: dict[str, np.ndarray], problem: Problem, truth: Reference, chosen: np.ndarray | None = None
) -> list[Verdict]:
    """Puts every tensor of a result through the gates.

    Args:
        arrays: "y" and gradients, flat in the token dimension.
        problem: the problem.
        truth: its reference.
        chosen: ids that the executor itself chose for tokens with broken routing; None if it does not tell them.
    """
    verdicts = []
    for name, actual in arrays.items():
        judged = None
        if name in PER_EXPERT:
            judged = _judged_experts(actual, problem, truth, chosen)
        elif name == "post_expert_norm":  # a sum over all slots (E8)
            judged = np.full(1, not truth.broken.any())
        else:
            judged = ~truth.infinite if name == "y" else ~truth.broken
        verdicts.append(judge(name, actual, truth.bars[name], problem.dtype, problem.dtype_of(name), judged))
    return verdicts


def _judged_experts(
    actual: np.ndarray, problem: Problem, truth: Reference, chosen: np.ndarray | None
) -> np.ndarray | None:
    """[E]: experts whose gradient counts; the gradients of those that a broken token chose may be NaN (R4)."""
    if not truth.broken.any() or actual.shape[:1] != (problem.experts,):
        return None
    judged = np.ones(problem.experts, dtype=bool)
    ids = truth.arrays.topk_ids[truth.broken]
    judged[ids[(ids >= 0) & (ids < problem.experts)]] = False
    if chosen is not None:
        judged[chosen[truth.broken].ravel()] = False
    elif truth.broken_routing.any():
        judged &= np.isfinite(actual.reshape(problem.experts, -1)).all(axis=1)
    return judged


def _demand(executor: Executor, problem: Problem, *faults: Fault | None, arrays: Arrays | None = None) -> None:
    """Raises with all faults, if there are any."""
    found = list(dict.fromkeys(filter(None, faults)))
    if found:
        raise ConformanceError(executor, problem, *found[0], arrays, found[1:])


def _route(executor: Executor, inputs: Inputs, mode: Mode) -> Routing | None:
    """The routing that the executor reports, or None."""
    route = getattr(executor, "route", None)
    if inputs.router_logits is None or route is None:
        return None
    with mode(), torch.no_grad():
        return route(inputs.router_logits, inputs.weights)


def check_route(executor: Executor, problem: Problem, truth: Reference, routing: Routing) -> np.ndarray:
    """T1, R2, R4: ids are int64; the choice is a right one; in broken rows the ids are in range and distinct.

    Returns the ids [T, K].
    """
    if routing.topk_ids.dtype != torch.int64:
        message = f"route returns topk_ids in {dtype_name(routing.topk_ids)}, but must return int64"
        raise ConformanceError(executor, problem, "T1", message)
    ids = routing.topk_ids.reshape(-1, problem.top_k).cpu().numpy()
    logits, bias = truth.arrays.router_logits, truth.arrays.weights.selection_bias
    assert logits is not None
    ordered = np.sort(ids, axis=1)
    bad = (ids < 0).any(axis=1) | (ids >= problem.experts).any(axis=1) | (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if bad.any():
        t = int(np.argmax(bad))
        message = f"topk_ids[{t}]={ids[t].tolist()}, but must be distinct and in [0, {problem.experts})"
        raise ConformanceError(executor, problem, "R4", message)
    expected = truth.arrays.topk_ids
    wrong = np.flatnonzero((ids != expected).any(axis=1) & ~truth.broken_routing)
    if keys_are_rounded(problem.config, bias):
        wrong = wrong[~admissible(ids[wrong], logits[wrong], problem.config, bias)]
    if wrong.size:
        t = int(wrong[0])
        message = f"topk_ids[{t}]={ids[t].tolist()}, but must be {expected[t].tolist()}"
        raise ConformanceError(executor, problem, "R2", message)
    weights = routing.topk_weights.reshape(-1, problem.top_k).double().cpu().numpy()
    impossible = np.take_along_axis(logits, ids, axis=1) == -math.inf
    leaking = impossible & (weights != 0) & ~truth.broken_routing[:, None]
    if leaking.any():
        raise ConformanceError(executor, problem, "R4", "an expert with logit -inf has a weight other than 0")
    if not (np.isnan(weights).all(axis=1) == truth.broken_routing).all():
        raise ConformanceError(executor, problem, "R4", "topk_weights must be NaN in rows that are undefined, only")
    return ids
