"""The judge of ``compare``: what the suite rejects for another reason than its numbers."""

from dataclasses import replace

import pytest

import executors
from executors._compare.judge import Truth, exact_answer, inputs_for, judge_executor
from executors.layer_file import bundled_layer, first_tokens, load_layer
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.wrapped import Declaring

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Of a few tokens of the bundled layer."""
    return exact_answer(first_tokens(load_layer(bundled_layer()), 8), 0)


def test_a_right_one_passes(truth: Truth) -> None:
    judgement = judge_executor(executors.get("native"), truth)
    assert judgement.failure == ""
    assert {"y", "x", "gate_up_proj"} <= judgement.z.keys()


@pytest.mark.parametrize(
    ("mutant", "said"),
    [
        ("output_in_fp32", "T2: y is float32, but must be bfloat16"),
        ("input_changed_in_place", "E4: down_proj was changed in place"),
        ("not_repeatable", "C1: "),
        ("inference_path_wrong", "C1, E1, E2: "),
        ("token_dropped", "C1, E1, E2: "),
    ],
)
def test_wrong_ones_are_told_apart(mutant: str, said: str, truth: Truth) -> None:
    """Inference too is judged, since it may take another path."""
    judgement = judge_executor(mutants(executors.get("native"))[mutant], truth)
    assert judgement.failure.startswith(said)


def test_routing_is_contiguous(truth: Truth) -> None:
    """Kernels that take no other strides are judged and timed on it."""
    inner = executors.get("native")
    executor = Declaring("elsewhere", inner, declared=replace(inner.capabilities, routing=False))
    inputs = inputs_for(executor, truth)
    assert inputs.topk_ids.is_contiguous()
    assert inputs.topk_weights.is_contiguous()  # type: ignore[union-attr]
