"""Teeth: the kernels' own text, spoiled in one place, is reported or gives other bits; or a reason is found why nothing
can show in that run. Reasons come from a log of all accesses, or from noise in place of numbers, not from the executor.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings

import executors
from executed_problems import FIXED
from executing import executing
from meetings import meet
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.problems.build import build
from recorded import recording
from spoiled import all_spoiled
from traced import tracing
from unnoticed import ORDERED, Trial

NIGHTLY = settings.get_current_profile_name() == "nightly"
PROBLEMS = [name for name, (_, path) in FIXED.items() if not path] if NIGHTLY else ["few, bf16"]
STEP = 3 if NIGHTLY else 13  # every so many-th place
DONE: set[str] = set()  # texts, of which problems share some


@pytest.mark.parametrize("name", PROBLEMS)
def test_spoiled_kernels_show_or_cannot(name: str) -> None:
    problem, _ = FIXED[name]
    with recording() as launches, executing():
        run(executors.get("triton"), to_torch(problem, build(problem)))
    counts: Counter[tuple[str, str]] = Counter()
    for own in launches:
        with tracing() as logs:
            assert own.verdict(own.ptx) == ""
        assert not meet(logs)[0], "the log must agree that nothing is wrong"
        if own.ptx in DONE:
            continue
        DONE.add(own.ptx)
        for kind, place, text in [*all_spoiled(own.ptx)][::STEP]:
            counts[kind, outcome(Trial(own, kind, place, text))] += 1
    for (kind, found), count in sorted(counts.items()):
        print(f"{count:5} {kind}: {found}")  # shown by pytest -rP
    if name == PROBLEMS[0]:
        assert {kind for kind, found in counts if found == "reported"} >= {"barrier", "guard", "zeros"}


def outcome(trial: Trial) -> str:
    """Reported, other bits, or why nothing shows."""
    said, meets = trial.verdict()
    line = f"{trial.own.name}: {trial.kind}: {trial.own.ptx.splitlines()[trial.place].strip()}"
    if said:
        assert meets or trial.kind not in ORDERED, f"{line}\nno accesses meet, yet: {said}"
        return said if said == "other bits" else "reported"
    reason = trial.reason()
    assert reason, f"{line}\nnothing shows, for no reason"
    return reason
