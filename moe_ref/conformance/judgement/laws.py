"""Metamorphic laws: change the problem in a way whose effect is known, undo the effect, and judge as before.

Each law is a function of (problem, arrays). It returns changed pairs, each with a function that undoes the effect. It
returns none where the law says nothing, and several where their results, joined along the tokens, make up the whole. No
law demands more than the specification: the undone result must lie within the error bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import (
    ConformanceError,
    applicable,
    result_arrays,
    verdicts_of,
    with_one_choice,
)
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.declared import undeclared
from moe_ref.conformance.problems.packed import of_experts, with_own_blocks
from moe_ref.conformance.problems.poison import Mode, modes
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import PER_EXPERT

if TYPE_CHECKING:
    from executors import Executor

SENTENCES = {  # of each law, for whoever breaks it
    "permute_tokens": "tokens in another order give the same rows in that order, and the same gradients of weights",
    "relabel_experts": "experts with other ids, and with them the ids of tokens, give the same result",
    "split_batch": "the two halves of a batch, one after the other, give the two halves of the result",
    "scale_weights": "routing weights twice as large give twice the output",
    "append_slot": "one more empty slot for each token changes nothing, whatever its weight (R7)",
    "append_expert": "one more expert that no token chooses changes nothing, and its gradients are 0 (D2)",
}

Results = dict[str, np.ndarray]
Changed = tuple[Problem, Arrays, Callable[[Results], Results]]
Law = Callable[[Problem, Arrays], list[Changed]]

ADDED = " of added "  # in the name of a gradient: of what a law has added to the problem
TOKEN_TENSORS = ("y", "x", "router_logits", "topk_weights")


def check_law(executor: Executor, problem: Problem, law: str, device: str = "cpu") -> bool:
    """Checks one law of `LAWS` on one problem; a failure says in `SENTENCES`' words what the law is.

    Returns:
        Whether the law says anything about this problem.

    Raises:
        ConformanceError: if the law is broken.
    """
    if not_judged(executor, law):
        return False
    problem = with_one_choice(applicable(executor, problem))
    if LAWS[law] in MOVING_EXPERTS:
        problem = with_own_blocks(problem, executor.capabilities)
    changes = LAWS[law](problem, build(problem))
    if not changes or any(undeclared(changed, executor.capabilities) for changed, _, _ in changes):
        return False
    truth = reference(problem)  # sampling takes most of the time: only where the law says something
    for mode in modes(executor):
        results = _joined(executor, changes, mode, device)
        effects = _effects(results)
        for verdict in verdicts_of(results, problem, truth):
            if verdict.failure:
                message = f"{effects.get(verdict.name, verdict.failure)}; the law: {SENTENCES[law]}"
                raise ConformanceError(executor, problem, f"the law {law}", message, verdict.name)
    return True


def _effects(results: Results) -> dict[str, str]:
    """Takes the gradients of what was added out of results; says by tensor which are not 0, and spoils that tensor."""
    said = {}
    for key in [key for key in results if ADDED in key]:
        name, _, of = key.partition(ADDED)
        gradient = np.atleast_1d(results.pop(key))
        wrong = gradient[gradient != 0]  # NaN is one of them
        if wrong.size:
            said[name] = f"the gradient of {name} of the added {of} has {wrong[0]:.9g}, but must be exactly 0"
            results[name] = np.full_like(results[name], math.inf)
    return said


def _joined(executor: Executor, changes: Sequence[Changed], mode: Mode, device: str) -> Results:
    """The results of changed problems with the changes undone, joined along the tokens."""
    results: list[Results] = []
    for changed, arrays, undo in changes:
        with mode():
            result = run(executor, to_torch(changed, arrays, device), executor.capabilities.backward)
        results.append(undo(result_arrays(result)))
    return {n: v if len(results) == 1 else np.concatenate([r[n] for r in results]) for n, v in results[0].items()}


def not_judged(executor: Executor, law: str) -> str:
    """Why the law says nothing about any problem of an executor, or ""."""
    able = executor.capabilities
    if law == "append_slot" and not able.empty_slots:
        return f"{executor.name} does not declare empty slots"
    if law == "scale_weights" and able.dtypes <= {"float16"}:
        return f"{executor.name} declares float16 alone, whose subnormal numbers do not scale exactly"
    return ""


def permute_tokens(problem: Problem, arrays: Arrays) -> list[Changed]:
    """Tokens in another order give the same rows in that order, and the same weight gradients."""
    order = np.random.default_rng(problem.seed).permutation(problem.tokens)
    inverse = np.argsort(order)

    def undo(results: Results) -> Results:
        return {n: v[inverse] if n in TOKEN_TENSORS else v for n, v in results.items()}

    return [(*of_tokens(problem, arrays, order), undo)]


def relabel_experts(problem: Problem, arrays: Arrays) -> list[Changed]:
    """Experts with other ids give the same output. Ties and groups are left out: they depend on ids."""
    if problem.config.num_groups > 1:
        return []
    if arrays.router_logits is not None:
        ordered = np.sort(arrays.router_logits, axis=1)
        if np.isnan(ordered).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
            return []
    order = np.random.default_rng(problem.seed).permutation(problem.experts)
    inverse = np.argsort(order)
    ids = arrays.topk_ids
    valid = (ids >= 0) & (ids < problem.experts)
    changed = replace(
        arrays,
        topk_ids=np.where(valid, inverse[np.where(valid, ids, 0)], ids),
        router_logits=None if arrays.router_logits is None else arrays.router_logits[:, order],
        weights=of_experts(arrays.weights, order),
    )

    def undo(results: Results) -> Results:
        undone = {n: v[inverse] if n in PER_EXPERT else v for n, v in results.items()}
        if "router_logits" in undone:
            undone["router_logits"] = undone["router_logits"][:, inverse]
        return undone

    return [(problem, changed, undo)]


def split_batch(problem: Problem, arrays: Arrays) -> list[Changed]:
    """The batch in two halves gives the two halves of the result; weight gradients, which add up, are left out."""
    middle = problem.tokens // 2
    return [
        (
            *of_tokens(problem, arrays, part),
            lambda results: {n: v for n, v in results.items() if n in TOKEN_TENSORS},
        )
        for part in (np.arange(middle), np.arange(middle, problem.tokens))
    ]


def scale_weights(problem: Problem, arrays: Arrays) -> list[Changed]:
    """Routing weights twice as large give twice the output: a power of two changes no rounding."""
    if problem.dtype == "float16" or problem.config.scale_input:  # subnormals scale by rounding, inputs through act
        return []
    if arrays.topk_weights is None:
        factor = 2 * problem.config.routed_scaling_factor
        changed = replace(problem, config=replace(problem.config, routed_scaling_factor=factor))
    else:
        arrays, changed = replace(arrays, topk_weights=2 * arrays.topk_weights), problem

    def undo(results: Results) -> Results:
        return {n: v if n == "topk_weights" else v / 2 for n, v in results.items()}

    return [(changed, arrays, undo)]


def append_slot(problem: Problem, arrays: Arrays) -> list[Changed]:
    """One more empty slot per token adds exactly nothing, whatever its weight (R7)."""
    if arrays.topk_weights is None:
        return []
    column = np.full((problem.tokens, 1), problem.experts)
    changed = replace(
        arrays,
        topk_ids=np.concatenate([arrays.topk_ids, column], axis=1),
        topk_weights=np.concatenate([arrays.topk_weights, np.full(column.shape, math.nan)], axis=1),
    )

    def undo(results: Results) -> Results:
        if "topk_weights" not in results:
            return results
        given, added = results["topk_weights"][:, :-1], results["topk_weights"][:, -1]
        return results | {"topk_weights": given, f"topk_weights{ADDED}slots": added}

    return [(replace(problem, empty_slots=True), changed, undo)]


def append_expert(problem: Problem, arrays: Arrays) -> list[Changed]:
    """One more expert that no token chooses changes nothing; its weights are NaN, its gradient exactly zero (D2)."""
    if problem.config.num_groups > 1:
        return []
    logits = arrays.router_logits
    if logits is not None:
        logits = np.concatenate([logits, np.full((problem.tokens, 1), -math.inf)], axis=1)
    ids = np.where(arrays.topk_ids == problem.experts, -1, arrays.topk_ids)
    changed = replace(
        arrays,
        topk_ids=ids,
        router_logits=logits,
        weights=of_experts(arrays.weights, np.array([*range(problem.experts), -1])),
    )

    def undo(results: Results) -> Results:
        undone = dict(results)
        for name in set(PER_EXPERT) & set(results):
            undone[name], undone[f"{name}{ADDED}expert"] = results[name][:-1], results[name][-1]
        if "router_logits" in results:
            undone["router_logits"] = results["router_logits"][:, :-1]
        return undone

    return [(replace(problem, experts=problem.experts + 1), changed, undo)]


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (permute_tokens, relabel_experts, split_batch, scale_weights, append_slot, append_expert)
}


MOVING_EXPERTS = (relabel_experts, append_expert)


def of_tokens(problem: Problem, arrays: Arrays, tokens: np.ndarray) -> tuple[Problem, Arrays]:
    """The problem with some of its tokens, in shapes and strides that remain possible."""
    expanded = problem.x_layout == "expanded"
    x_layout = "contiguous" if expanded else problem.x_layout
    names = ("x", "dy", "topk_ids", "router_logits", "topk_weights")
    values = {name: getattr(arrays, name) for name in names}
    taken: dict[str, Any] = {name: None if v is None else v[tokens] for name, v in values.items()}
    return replace(problem, tokens=len(tokens), batch=False, x_layout=x_layout), replace(arrays, **taken)
