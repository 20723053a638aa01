"""Teeth: the kernels' own text, spoiled in one place, is reported or gives other bits.

What goes unnoticed changes nothing in that run: a barrier between accesses that do not meet, or a guard that holds for
all threads.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings

import executors
from executed_problems import FIXED, SM90
from executing import LACKS_FENCE, executing
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.problems.build import build
from recorded import recording
from spoiled import all_spoiled

NIGHTLY = settings.get_current_profile_name() == "nightly"
PROBLEMS = [("sm80", name) for name, (_, path) in FIXED.items() if not path] if NIGHTLY else [("sm80", "few, bf16")]
PROBLEMS += [("sm90", name) for name in SM90] if NIGHTLY else [("sm90", "few, bf16, TMA")]
STEP = 1 if NIGHTLY else 5  # every so many-th place
LEAST = {"barrier": 0.5, "wait": 0.3, "guard": 0.3, "zeros": 0.3}  # of the places of a kind that must show
# On sm90 there is a barrier before each copy by TMA. What is for later steps of a loop changes nothing in short ones.
LEAST_ON_SM90 = LEAST | {"barrier": 0.35, "zeros": 0.2, "landing": 1.0, "bytes": 0.4, "issue": 0.4}
LEAST_ON_SM90 |= {"proxies fenced": 0.4}
LEAST_ON_SM90 |= dict.fromkeys(("products waited for", "products committed", "products fenced"), 0.9)


@pytest.mark.parametrize(("target", "name"), PROBLEMS)
def test_spoiled_kernels_show(target: str, name: str) -> None:
    if target == "sm90" and LACKS_FENCE:
        pytest.skip("Triton before 3.7.1 lacks a fence")
    problem, _ = (FIXED | SM90)[name]
    with recording() as launches, executing(target=target):
        run(executors.get("triton"), to_torch(problem, build(problem)))
    shown: dict[str, list[bool]] = defaultdict(list)
    for own in launches:
        assert own.verdict(own.ptx) == ""
        for kind, _place, text in [*all_spoiled(own.ptx)][::STEP]:
            shown[kind].append(bool(own.verdict(text)))
    least = LEAST_ON_SM90 if target == "sm90" else LEAST
    assert set(shown) <= set(least)
    for kind, found in shown.items():
        assert sum(found) >= least[kind] * len(found), (kind, sum(found), len(found))
    assert set(shown) >= {"barrier", "guard", *(("landing", "bytes", "issue") if target == "sm90" else ())}
