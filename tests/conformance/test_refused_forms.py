"""The form of refusals: other words pass, a missing value, two lines, another type or none at all do not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import executors
from moe_ref.conformance.judgement import errors
from moe_ref.conformance.judgement.call import Inputs, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.judgement.errors import check_errors, refusal_fault
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.wrapped import Wrapped

NATIVE = executors.get("native")
Words = Callable[[BaseException], BaseException]


@dataclass(frozen=True)
class InOtherWords(Wrapped):
    """Refuses what its inner executor refuses, by an error of its own."""

    words: Words = lambda error: error

    def __call__(self, x, router_logits, weights):  # type: ignore[no-untyped-def]
        return self.told(lambda: self.inner(x, router_logits, weights), x)

    def experts(self, x, *, topk_ids, topk_weights, weights):  # type: ignore[no-untyped-def]
        given = {"topk_ids": topk_ids, "topk_weights": topk_weights, "weights": weights}
        return self.told(lambda: self.inner.experts(x, **given), x)

    def told(self, call: Callable[[], Any], x: Any) -> Any:
        try:
            return call()
        except (ValueError, TypeError) as error:
            found = self.words(error)
        if found is None:
            return x
        raise found


def parts(error: BaseException) -> tuple[str, str, str]:
    about, _, allowed = str(error).partition(": must be ")
    name, _, value = about.partition("=")
    return name, value, allowed


def in_other_words(error: BaseException) -> BaseException:
    name, value, allowed = parts(error)
    return ValueError(f"my_kernel: bad argument {name}; expected {allowed}, but got {value}")


SPOILT: dict[str, tuple[Words, str]] = {
    "no value": (lambda e: ValueError(f"bad argument {parts(e)[0]}"), "gives the value of"),
    "no name": (lambda e: ValueError("bad argument"), "names"),
    "two lines": (lambda e: ValueError(f"{in_other_words(e)}\nsee the manual"), "one line"),
    "nothing to read": (lambda e: ValueError(), "one line"),
    "another type": (lambda e: RuntimeError(str(in_other_words(e))), "a ValueError or a TypeError"),
    "an assertion": (lambda e: AssertionError(str(e)), "a ValueError or a TypeError"),
    "accepted": (lambda e: None, "raises nothing"),  # type: ignore[arg-type, return-value]
}


def test_other_words_in_the_right_form_pass() -> None:
    check_errors(InOtherWords("other", NATIVE, words=in_other_words))
    check_errors(InOtherWords("other", executors.get("grouped_nf4"), words=in_other_words))


@pytest.mark.parametrize("how", SPOILT)
def test_another_form_fails_for_every_bad_input(how: str) -> None:
    words, says = SPOILT[how]
    with pytest.raises(ConformanceError, match="the contract on errors") as caught:
        check_errors(InOtherWords("spoilt", NATIVE, words=words))
    every = 2 * len(errors.BAD_INPUTS) + len(errors.LAYER_ONLY) + len(errors.EXPERTS_ONLY)
    assert len(caught.value.faults) == every
    assert all(says in fault.message for fault in caught.value.faults)


def test_who_uses_our_checks_must_have_our_words() -> None:
    def mixed_up(error: BaseException) -> BaseException:
        name, value, allowed = parts(error)
        error.args = (f"{name}={value}: should be {allowed}",)  # the same error, as moe_ref.validation raised it
        return error

    with pytest.raises(ConformanceError, match="must raise these words"):
        check_errors(InOtherWords("mixed up", NATIVE, words=mixed_up))


@dataclass(frozen=True)
class Own(InOtherWords):
    """As if it were an executor of this package."""


Own.__module__ = "executors.own"


def test_executors_of_this_package_must_have_our_words() -> None:
    with pytest.raises(ConformanceError, match="must raise these words"):
        check_errors(Own("own", NATIVE, words=in_other_words))


WORDS = [  # what is wrong, what somebody may say of it, and whether that has the form
    ("x too narrow", "x has hidden size 7, gate_up_proj has 8", True),
    ("x too narrow", "expected x of [4, 8], got [4, 7]", True),
    ("x too narrow", "expected x of width 8", False),
    ("x too narrow", "expected 8, got 7", False),
    ("x of another dtype", "x is torch.bfloat16 and gate_up_proj is torch.float32", True),
    ("x of another dtype", "x must be torch.float32", False),
    ("x of another dtype", "x is in BF16: fp32 is wanted", True),
    ("x no array", "x must be a tensor, not list", True),
    ("x no array", "x must be a tensor", False),
    ("down_proj transposed", "down_proj: torch.Size([6, 5, 8]) does not fit", True),
    ("down_proj transposed", "gate_up_proj (6, 10, 8) and down_proj do not fit", True),
    ("top_k zero", "top_k must be positive, got 0", True),
    ("top_k zero", "top_k must be positive, got 10", False),
    ("scoring unknown", "no such scoring: softmax2", True),
    ("scoring unknown", "no such scoring", False),
    ("limit negative", "limit is -1.0", True),
    ("limit negative", "limit is 1.0", False),
    ("alpha NaN", "alpha: nan is not allowed", True),
    ("config no MoEConfig", "config is a dict", True),
    ("lora without its second factor", "gate_up_lora_a is there, gate_up_lora_b is missing", True),
    ("weights no MoEWeights", "weights: got tuple", True),
]


@pytest.mark.parametrize(("what", "says", "passes"), WORDS)
def test_words_are_judged_by_their_form(what: str, says: str, passes: bool) -> None:
    spoil, argument = errors.BAD_INPUTS[what]
    bad: Inputs = spoil(to_torch(errors._PROBLEM, build(errors._PROBLEM)))
    fault = refusal_fault(InOtherWords("other", NATIVE, words=lambda _: ValueError(says)), bad, argument, what)
    assert (fault is None) == passes, fault


def test_who_lacks_something_may_see_that_first() -> None:
    """Unsupported may blame what is right but not for this executor, and still names it with its value."""
    spoil, argument = errors.BAD_INPUTS["x too narrow"]
    bad = spoil(to_torch(errors._PROBLEM, build(errors._PROBLEM)))
    for kind, says, passes in (
        (executors.Unsupported, "scoring='softmax': must be 'sigmoid' for other", True),
        (executors.Unsupported, "scoring: must be 'sigmoid' for other", False),
        (ValueError, "scoring='softmax': must be 'sigmoid' for other", False),
    ):
        executor = InOtherWords("other", NATIVE, words=lambda _, kind=kind, says=says: kind(says))  # type: ignore[misc]
        assert (refusal_fault(executor, bad, argument, "x too narrow") is None) == passes


def test_what_is_right_is_not_refused() -> None:
    inputs = to_torch(errors._PROBLEM, build(errors._PROBLEM))
    with torch.no_grad():
        InOtherWords("other", NATIVE, words=in_other_words)(inputs.x, inputs.router_logits, replace(inputs.weights))
