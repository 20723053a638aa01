"""Drawn problems on which the specification is compared with itself, and the demand that its results agree."""

from dataclasses import replace

import numpy as np

from moe_ref.conformance.judgement.checks import with_one_choice
from moe_ref.conformance.judgement.gates import judge
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems


def sound(problem: Problem) -> Problem:
    """Problems in float64 with everything differentiable, nothing broken, and one right choice of experts."""
    return with_one_choice(
        replace(
            problem,
            dtype="float64",
            routing_dtype="float64",
            bias_dtype="float64",
            lora_dtype="float64",
            broken_logits=0,
            broken_x=0,
            frozen=frozenset(),
            expert_scale=problem.expert_scale and problem.entry == "layer",  # ignored otherwise
        )
    )


sound_problems = problems().map(sound)


def agree(problem: Problem, results: dict[str, np.ndarray]) -> None:
    """Demands the error bars of float64, which are far below 1e-12 of the sum of the terms' sizes."""
    bars = reference(problem).bars
    for name, value in results.items():
        verdict = judge(name, value, bars[name], "float64", "float64")
        assert not verdict.failure, verdict.failure
