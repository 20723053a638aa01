"""The group ``citizen`` has teeth: each behaviour rejects an executor that lacks it, and accepts those that have it."""

import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from torch.autograd import forward_ad

import executors
from bad_citizens import BAD
from executors import Executor
from moe_ref.conformance.citizen import BEHAVIOURS, check_citizen, company
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.wrapped import Declaring, Wrapped, experts
from moe_ref.types import MoEWeights

NATIVE = executors.get("native")
PAGE = Path(__file__).parents[2] / "docs" / "adding-an-executor.md"


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_bad_citizen_is_rejected(behaviour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "LIMIT", 0.5)
    with pytest.raises(ConformanceError, match=f"breaks the behaviour {behaviour}: "):
        check_citizen(BAD[behaviour](NATIVE), behaviour)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_wrapper_that_changes_nothing_is_accepted(behaviour: str) -> None:
    assert check_citizen(Wrapped("harmless", NATIVE), behaviour) in ("", "harmless has no route")


@pytest.mark.parametrize("behaviour", ["fork", "data_loader"])
@pytest.mark.parametrize(("words", "accepted"), [("native: no calls after a fork", True), ("native: not here", False)])
def test_a_forked_process_may_be_refused_in_words(behaviour: str, words: str, accepted: bool) -> None:
    process = os.getpid()

    def refused(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
        if os.getpid() != process:
            raise RuntimeError(words)
        return experts(inner, x, ids, w, weights)

    expected = nullcontext() if accepted else pytest.raises(ConformanceError, match=f"breaks the behaviour {behaviour}")
    with expected:
        assert check_citizen(Wrapped("refused", NATIVE, slots=refused), behaviour) == ""


@pytest.mark.parametrize(
    "less",
    [
        {"dtypes": frozenset({"float64", "bfloat16"})},
        {"dtypes": frozenset({"bfloat16"})},
        {"dtypes": frozenset({"float16"}), "bias_dtypes": frozenset({"float32"})},
        {"bias_dtypes": frozenset({"bfloat16", "float64"})},
    ],
    ids=str,
)
def test_forward_mode_in_every_dtype(less: dict[str, frozenset[str]]) -> None:
    """Gradients are rounded to their own dtypes, wider or narrower than x's; a tangent that is dropped still shows.

    One that is wrong by a factor shows in wide dtypes alone.
    """
    able = replace(NATIVE.capabilities, **less)
    assert check_citizen(Declaring("honest", NATIVE, declared=able), "forward_mode") == ""
    with pytest.raises(ConformanceError, match="silently 0"):
        check_citizen(Declaring("drops", BAD["forward_mode"](NATIVE), declared=able), "forward_mode")
    half = Declaring("halves", NATIVE, slots=halves_tangents, declared=able)
    if not able.dtypes & {"float32", "float64"}:
        return
    with pytest.raises(ConformanceError, match="in forward mode, but must be"):
        check_citizen(half, "forward_mode")


def halves_tangents(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is not None:
        x = forward_ad.make_dual(primal, tangent / 2)
    return experts(inner, x, ids, w, weights)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_auto(behaviour: str) -> None:
    assert check_citizen(executors.get("auto"), behaviour) == ""


def test_the_page_lists_every_behaviour() -> None:
    (table,) = re.findall(r"^\| behaviour \| .*\n\|---\|---\|\n((?:\|.*\n)+)", PAGE.read_text(), flags=re.MULTILINE)
    assert table.splitlines() == [f"| `{name}` | {behaviour.__doc__} |" for name, behaviour in BEHAVIOURS.items()]
