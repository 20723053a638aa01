"""Teeth: the kernels' own text, spoiled in one place, is reported or gives other bits.

What goes unnoticed changes nothing in that run: a barrier between accesses that do not meet, or a guard that holds for
all threads.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings

import executors
from executed_problems import FIXED
from executing import executing
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.problems.build import build
from recorded import recording
from spoiled import KINDS, all_spoiled

NIGHTLY = settings.get_current_profile_name() == "nightly"
PROBLEMS = [name for name, (_, path) in FIXED.items() if not path] if NIGHTLY else ["few, bf16"]
STEP = 1 if NIGHTLY else 5  # every so many-th place
LEAST = {"barrier": 0.5, "wait": 0.3, "guard": 0.3, "zeros": 0.3}  # of the places of a kind that must show


@pytest.mark.parametrize("name", PROBLEMS)
def test_spoiled_kernels_show(name: str) -> None:
    problem, _ = FIXED[name]
    with recording() as launches, executing():
        run(executors.get("triton"), to_torch(problem, build(problem)))
    shown: dict[str, list[bool]] = defaultdict(list)
    for own in launches:
        assert own.verdict(own.ptx) == ""
        for kind, _place, text in [*all_spoiled(own.ptx)][::STEP]:
            shown[kind].append(bool(own.verdict(text)))
    for kind in KINDS:
        assert sum(shown[kind]) >= LEAST[kind] * len(shown[kind]), (kind, sum(shown[kind]), len(shown[kind]))
    assert shown["barrier"]
    assert shown["guard"]
