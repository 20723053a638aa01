"""Teeth on sm_90: the kernels' own text, spoiled in one place, is reported or gives other bits.

On sm_80 each place that goes unnoticed has its reason (`compiled_spoiled`). Here a part of the places of each kind must
show: there is a barrier before each copy by TMA, and what is for later steps of a loop changes nothing in short ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import settings

import executors
from executed_problems import SM90
from executing import LACKS_FENCE, executing
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.problems.build import build
from recorded import recording
from spoiled import all_spoiled

NIGHTLY = settings.get_current_profile_name() == "nightly"
PROBLEMS = [*SM90] if NIGHTLY else ["few, bf16, TMA"]
EVERY = dict.fromkeys(("barrier", "wait", "commit", "guard", "shared guard", "zeros"), 11)  # every so many-th place
EVERY |= dict.fromkeys(("landing", "bytes", "issue"), 3)
LEAST = {"barrier": 0.35, "wait": 0.3, "commit": 0.3, "guard": 0.3, "shared guard": 0.0, "zeros": 0.2}
LEAST |= {"landing": 1.0, "bytes": 0.4, "issue": 0.4, "proxies fenced": 0.3}  # of the places of a kind that must show
LEAST |= {"products waited for": 0.5, "products committed": 1.0, "products fenced": 1.0}


@pytest.mark.skipif(LACKS_FENCE, reason="Triton before 3.7.1 lacks a fence")
@pytest.mark.parametrize("name", PROBLEMS)
def test_spoiled_kernels_show(name: str) -> None:
    problem, _ = SM90[name]
    with recording() as launches, executing(target="sm90"):
        run(executors.get("triton"), to_torch(problem, build(problem)))
    shown: dict[str, list[bool]] = defaultdict(list)
    for own in launches:
        assert own.verdict(own.ptx) == ""
        seen: Counter[str] = Counter()
        for kind, _place, text in all_spoiled(own.ptx):
            seen[kind] += 1
            if NIGHTLY or (seen[kind] - 1) % EVERY.get(kind, 1) == 0:
                shown[kind].append(bool(own.verdict(text)))
    assert set(shown) <= set(LEAST)
    print({kind: (sum(found), len(found)) for kind, found in shown.items()})  # shown by pytest -rP
    for kind, found in shown.items():
        assert sum(found) >= LEAST[kind] * len(found), (kind, sum(found), len(found))
    assert set(shown) >= {"barrier", "guard", "landing", "bytes", "issue"}
